"""A run's store: every result of a run, kept as soon as it is known.

One folder, one run, one SQLite file (see `schema` for its tables, `database` for its safety). Each
`save_…` is one commit. What is derived (duplicates, accuracies) is computed on reading, so that it
is the same in whatever order, and after however many interruptions, the facts came in.
"""

import hashlib
import json
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.errors import UserError
from sdjax.evaluation.task import Outcome
from sdjax.search.database import Database
from sdjax.search.pairs import Pair, Scored
from sdjax.search.records import (
    MAIN,
    SEARCH,
    Application,
    Candidate,
    Checkpoint,
    JudgedSample,
    Lineage,
    OutcomeLike,
    Program,
    RunRecord,
    Sample,
    Setting,
    StoredVerdict,
    Summary,
    VerdictLike,
    storable,
    text_hash,
)

ADMISSIBLE = ("admitted", "duplicate")


class Store:
    """The typed face of a run's database. A context manager."""

    def __init__(self, database: Database):
        self._db = database

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        config: Mapping[str, Any],
        versions: Mapping[str, str],
        layers: Sequence[str],
    ) -> "Store":
        """Starts a run in a folder. Raises UserError where there is one already."""
        row = (_json(config), fingerprint(config), _json(versions), _json(list(layers)), _now())
        statement = (
            "INSERT INTO run (id, config, fingerprint, versions, layers, started_at) "
            "VALUES (1, ?, ?, ?, ?, ?)"
        )
        return cls(Database.create(Path(folder), [(statement, row)]))

    @classmethod
    def open(cls, folder: Path, *, write: bool = False) -> "Store":
        """Opens a folder's run; one writer at a time, readers whenever they like.

        Raises UserError where there is none, or it is damaged, of another version, or taken.
        """
        return cls(Database.open(Path(folder), write=write))

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @property
    def folder(self) -> Path:
        return self._db.folder

    # The run

    def run(self) -> RunRecord:
        rows = self._db.read("SELECT * FROM run")
        if not rows:
            raise UserError(f"{self._db.path}: its table run is empty; start again with --out")
        (row,) = rows
        return RunRecord(
            config=json.loads(row["config"]),
            fingerprint=row["fingerprint"],
            versions=json.loads(row["versions"]),
            layers=tuple(json.loads(row["layers"])),
            started_at=row["started_at"],
            finished_at=row["finished_at"],
        )

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raises UserError, naming the first key that differs, where the run has another config."""
        kept = self.run()
        if fingerprint(config) == kept.fingerprint:
            return
        mine, theirs = _flat(json.loads(_json(config))), _flat(kept.config)
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise UserError(
                    f"{self.folder}: its run has {key} = {theirs.get(key)!r}, not "
                    f"{mine.get(key)!r}; resume with the run's own config or choose another --out"
                )

    def finish(self) -> None:
        self._db.write("UPDATE run SET finished_at = ? WHERE id = 1", (_now(),))

    def save_setting(self, setting: Setting) -> None:
        """Keeps a setting. Raises ValueError where one of that name is another."""
        self._db.write(
            "INSERT INTO setting VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (setting.name, setting.seed, _json(setting.slots), setting.scope, setting.task),
        )
        if setting not in self.settings():
            raise ValueError(f"setting {setting.name!r} is another in {self._db.path}")

    def settings(self) -> tuple[Setting, ...]:
        return tuple(
            Setting(**{**dict(row), "slots": json.loads(row["slots"])})
            for row in self._db.read("SELECT * FROM setting ORDER BY rowid")
        )

    def save_lineage(self, lineage: Lineage) -> None:
        self._db.write(
            "INSERT OR REPLACE INTO lineage VALUES (?, ?, ?, ?, ?)",
            (
                lineage.iteration,
                lineage.setting,
                lineage.generator,
                lineage.checkpoint,
                lineage.temperature,
            ),
        )

    def lineage(self) -> tuple[Lineage, ...]:
        rows = self._db.read("SELECT * FROM lineage ORDER BY iteration")
        return tuple(Lineage(**dict(row)) for row in rows)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Records a checkpoint, after its files are whole."""
        self._db.write(
            "INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
            "iteration = excluded.iteration, role = excluded.role, path = excluded.path, "
            "detail = excluded.detail, saved_at = excluded.saved_at",
            (
                checkpoint.name,
                checkpoint.iteration,
                checkpoint.role,
                checkpoint.path,
                _json(checkpoint.detail),
                _now(),
            ),
        )

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        rows = self._db.read(
            "SELECT name, iteration, role, path, detail FROM checkpoint ORDER BY iteration, name"
        )
        return tuple(
            Checkpoint(**{**dict(row), "detail": json.loads(row["detail"])}) for row in rows
        )

    def save_phase(self, iteration: int, name: str, seconds: float) -> None:
        """Marks a phase of an iteration as done; a resumed run passes it over."""
        self._db.write(
            "INSERT OR REPLACE INTO phase VALUES (?, ?, ?, ?)", (iteration, name, seconds, _now())
        )

    def phases(self) -> dict[tuple[int, str], float]:
        """(iteration, name) -> seconds of each phase that is done, in the order they ended."""
        rows = self._db.read("SELECT * FROM phase ORDER BY finished_at, rowid")
        return {(row["iteration"], row["name"]): row["seconds"] for row in rows}

    # Samples and verdicts

    def save_prompt(self, name: str, text: str) -> str:
        """Keeps a prompt and returns its hash."""
        digest = text_hash(text)
        self._db.write(
            "INSERT INTO prompt VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (digest, name, storable(text)),
        )
        return digest

    def prompts(self) -> dict[str, str]:
        """hash -> text."""
        return {row["hash"]: row["text"] for row in self._db.read("SELECT * FROM prompt")}

    def save_samples(self, samples: Iterable[Sample]) -> None:
        """Keeps samples, all or none. Raises sqlite3.IntegrityError where one is there already."""
        self._db.write(
            "INSERT INTO sample VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *[
                (
                    sample.purpose,
                    sample.iteration,
                    sample.number,
                    sample.prompt,
                    storable(sample.text),
                    np.asarray(sample.tokens, dtype="<i4").tobytes(),
                    int(sample.stopped),
                    None if sample.source is None else text_hash(sample.source),
                )
                for sample in samples
            ],
        )

    def sample_numbers(self, iteration: int, purpose: str = SEARCH) -> set[int]:
        """The numbers of the samples that an iteration has already."""
        rows = self._db.read(
            "SELECT number FROM sample WHERE purpose = ? AND iteration = ?", (purpose, iteration)
        )
        return {row["number"] for row in rows}

    def save_verdict(self, source: str, verdict: VerdictLike, layers: Sequence[str] = ()) -> None:
        """Keeps the first verdict on a source text, and its program if it is admissible."""
        text = storable(source)
        row = (
            text_hash(source),
            text,
            verdict.verdict,
            verdict.rule,
            storable(verdict.message),
            verdict.identity,
            verdict.structure,
            verdict.form,
            _json(list(verdict.requests)),
            verdict.wire,
            _json(list(verdict.notes)),
            _bounded(verdict.cost),
            _bounded(verdict.memory),
            _json(list(layers)),
        )
        with self._db.transaction() as connection:
            connection.execute(
                f"INSERT INTO verdict VALUES ({', '.join('?' * len(row))}) ON CONFLICT DO NOTHING",
                row,
            )
            if verdict.verdict in ADMISSIBLE and verdict.identity is not None:
                connection.execute(
                    "INSERT INTO program (identity, source) VALUES (?, ?) ON CONFLICT DO NOTHING",
                    (verdict.identity, text),
                )

    def verdict_of(self, source: str) -> StoredVerdict | None:
        """The verdict on a source text, or None where it was not judged yet."""
        rows = self._db.read("SELECT * FROM verdict WHERE source_hash = ?", (text_hash(source),))
        return _verdict(rows[0]) if rows else None

    def verdicts(self) -> dict[str, StoredVerdict]:
        """Source hash -> verdict, of all texts that were judged."""
        rows = self._db.read("SELECT * FROM verdict ORDER BY rowid")
        return {row["source_hash"]: _verdict(row) for row in rows}

    def wire_of(self, identity: str) -> str:
        """The verified program of an identity. Raises KeyError where there is none."""
        rows = self._db.read(
            "SELECT wire FROM verdict WHERE identity = ? AND wire IS NOT NULL ORDER BY rowid",
            (identity,),
        )
        if not rows:
            raise KeyError(identity)
        return rows[0]["wire"]

    def judged(self, iteration: int | None = None, purpose: str = SEARCH) -> list[JudgedSample]:
        """The samples of a purpose, in order, with what became of each.

        A program is admitted at its first sample over the whole purpose and a duplicate after.
        """
        rows = self._db.read(
            """
            SELECT s.iteration, s.number, s.prompt, s.text, s.tokens, s.stopped, s.source_hash,
                   v.verdict, v.rule, coalesce(p.same_as, v.identity) AS identity,
                   EXISTS (SELECT 1 FROM application a JOIN candidate c ON c.name = a.candidate
                           WHERE c.identity = v.identity AND NOT a.finite
                           AND a.setting = coalesce(l.setting, 'main')) AS burst
            FROM sample s
            LEFT JOIN verdict v ON v.source_hash = s.source_hash
            LEFT JOIN program p ON p.identity = v.identity
            LEFT JOIN lineage l ON l.iteration = s.iteration
            WHERE s.purpose = ? ORDER BY s.iteration, s.number
            """,
            (purpose,),
        )
        seen: set[str] = set()
        samples = []
        for row in rows:
            status, rule, identity = _status(row, seen)
            if iteration is None or row["iteration"] == iteration:
                samples.append(
                    JudgedSample(
                        iteration=row["iteration"],
                        number=row["number"],
                        prompt=row["prompt"],
                        text=row["text"],
                        tokens=tuple(np.frombuffer(row["tokens"], dtype="<i4").tolist()),
                        stopped=bool(row["stopped"]),
                        source_hash=row["source_hash"],
                        status=status,
                        rule=rule,
                        identity=identity,
                    )
                )
        return samples

    # Programs

    def save_same_as(self, identity: str, original: str) -> None:
        """Records that a program gives the outputs of an earlier one on the probe tensors."""
        with self._db.transaction() as connection:
            row = connection.execute(
                "SELECT coalesce(same_as, identity) AS root FROM program WHERE identity = ?",
                (original,),
            ).fetchone()
            if row is None or row["root"] == identity:
                raise ValueError(f"{original!r} is no earlier program than {identity!r}")
            connection.execute(
                "UPDATE program SET same_as = ? WHERE identity = ? OR same_as = ?",
                (row["root"], identity, identity),
            )

    def save_origin(
        self,
        identity: str,
        *,
        in_training: bool | None,
        families: Sequence[str] | None,
        held_out: Sequence[str] | None,
    ) -> None:
        """Records whether a program is remembered from the generator's training programs."""
        self._db.write(
            "UPDATE program SET in_training = ?, families = ?, held_out = ? WHERE identity = ?",
            (
                None if in_training is None else int(in_training),
                None if families is None else _json(sorted(families)),
                None if held_out is None else _json(sorted(held_out)),
                identity,
            ),
        )

    def programs(self) -> dict[str, Program]:
        """identity -> program, in the order they came."""
        rows = self._db.read(
            "SELECT p.*, v.notes, v.cost FROM program p LEFT JOIN verdict v "
            "ON v.identity = p.identity AND v.source = p.source ORDER BY p.rowid"
        )
        return {
            row["identity"]: Program(
                identity=row["identity"],
                source=row["source"],
                same_as=row["same_as"],
                in_training=None if row["in_training"] is None else bool(row["in_training"]),
                families=None if row["families"] is None else tuple(json.loads(row["families"])),
                held_out=None if row["held_out"] is None else tuple(json.loads(row["held_out"])),
                notes=() if row["notes"] is None else tuple(json.loads(row["notes"])),
                cost=row["cost"],
            )
            for row in rows
        }

    # Scores

    def save_candidate(self, candidate: Candidate) -> None:
        self._db.write(
            "INSERT INTO candidate VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (candidate.name, candidate.kind, candidate.identity, _json(candidate.detail)),
        )

    def candidates(self) -> dict[str, Candidate]:
        rows = self._db.read("SELECT * FROM candidate ORDER BY rowid")
        return {
            row["name"]: Candidate(**{**dict(row), "detail": json.loads(row["detail"])})
            for row in rows
        }

    def save_application(self, application: Application) -> None:
        """Records what applying a candidate gave; a non-finite change is kept as finite=False."""
        finite = application.finite and bool(np.isfinite(application.change))
        self._db.write(
            "INSERT OR REPLACE INTO application VALUES (?, ?, ?, ?, ?)",
            (
                application.candidate,
                application.setting,
                int(finite),
                float(application.change) if finite else 0.0,
                application.seconds,
            ),
        )

    def applications(self, setting: str = MAIN) -> dict[str, Application]:
        """Candidate -> what applying it in a setting gave."""
        rows = self._db.read("SELECT * FROM application WHERE setting = ?", (setting,))
        return {
            row["candidate"]: Application(**{**dict(row), "finite": bool(row["finite"])})
            for row in rows
        }

    def save_scores(
        self,
        candidate: str,
        split: str,
        outcomes: Iterable[OutcomeLike],
        *,
        complete: bool = True,
        setting: str = MAIN,
    ) -> None:
        """Adds outcomes of a candidate in a setting on a split, all or none.

        `complete` says that these are the last. Raises ValueError where the evaluation is complete
        already (the test problems are scored once), sqlite3.IntegrityError on a problem twice.
        """
        key = (candidate, setting, split)
        with self._db.transaction() as connection:
            connection.execute(
                "INSERT INTO evaluation (candidate, setting, split, complete) VALUES (?, ?, ?, 0) "
                "ON CONFLICT DO NOTHING",
                key,
            )
            row = connection.execute(
                "SELECT id, complete FROM evaluation "
                "WHERE candidate = ? AND setting = ? AND split = ?",
                key,
            ).fetchone()
            if row["complete"]:
                raise ValueError(f"{candidate} in {setting} on {split} was scored already")
            connection.executemany(
                "INSERT INTO score VALUES (?, ?, ?, ?, ?)",
                [
                    (row["id"], o.problem_id, int(o.strict), int(o.flexible), storable(o.output))
                    for o in outcomes
                ],
            )
            connection.execute(
                "UPDATE evaluation SET complete = ? WHERE id = ?", (int(complete), row["id"])
            )

    def outcomes(self, candidate: str, split: str, setting: str = MAIN) -> tuple[Outcome, ...]:
        """Every outcome of an evaluation, by problem id; empty where there is none."""
        rows = self._db.read(
            "SELECT s.* FROM score s JOIN evaluation e ON e.id = s.evaluation "
            "WHERE e.candidate = ? AND e.setting = ? AND e.split = ? ORDER BY s.problem",
            (candidate, setting, split),
        )
        return tuple(
            Outcome(
                problem_id=row["problem"],
                output=row["output"],
                strict=bool(row["strict"]),
                flexible=bool(row["flexible"]),
            )
            for row in rows
        )

    def summaries(self, split: str | None = None, setting: str | None = MAIN) -> list[Summary]:
        """Accuracies of every evaluation, in the order they were begun; None: of all of them."""
        rows = self._db.read(
            """
            SELECT e.candidate, e.setting, e.split, e.complete, count(*) AS problems,
                   avg(s.strict) AS strict, avg(s.flexible) AS flexible
            FROM evaluation e JOIN score s ON s.evaluation = e.id
            WHERE (? IS NULL OR e.split = ?) AND (? IS NULL OR e.setting = ?)
            GROUP BY e.id ORDER BY e.id
            """,
            (split, split, setting, setting),
        )
        return [Summary(**{**dict(row), "complete": bool(row["complete"])}) for row in rows]

    # Pairs

    def save_pairs(self, iteration: int, pairs: Sequence[Pair]) -> None:
        """Keeps an iteration's pairs, all or none. Raises sqlite3.IntegrityError if it has some."""
        self._db.write(
            f"INSERT INTO pair VALUES ({', '.join('?' * 12)})",
            *[
                (iteration, number, *_side(pair.winner), *_side(pair.loser))
                for number, pair in enumerate(pairs)
            ],
        )

    def pairs(self, iteration: int) -> list[dict[str, Any]]:
        """An iteration's pairs in order, as the table's rows."""
        rows = self._db.read("SELECT * FROM pair WHERE iteration = ? ORDER BY number", (iteration,))
        return [dict(row) for row in rows]


def fingerprint(config: Mapping[str, Any]) -> str:
    """The hash of a config's JSON, by which a resumed run knows its own."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _status(row: sqlite3.Row, seen: set[str]) -> tuple[str, str, str | None]:
    """Status, rule and identity of a sample's row; admitted identities are added to `seen`."""
    if row["source_hash"] is None:
        return "no program", "no program in the text", None
    if row["verdict"] is None:
        return "not judged", "", None
    if row["verdict"] not in ADMISSIBLE:
        return row["verdict"], row["rule"], None
    if row["burst"]:
        return "non-finite", "non-finite when applied", None
    duplicate = row["identity"] in seen
    seen.add(row["identity"])
    return "duplicate" if duplicate else "admitted", "", row["identity"]


def _verdict(row: sqlite3.Row) -> StoredVerdict:
    fields = {name: row[name] for name in row.keys() if name != "source_hash"}  # noqa: SIM118
    for name in ("requests", "notes", "layers"):
        fields[name] = tuple(json.loads(fields[name]))
    return StoredVerdict(**fields)


def _side(program: Scored) -> tuple[str, int, str, str, float]:
    text = storable(program.text)
    return (program.identity, program.iteration, program.prompt, text, program.score)


def _bounded(number: int | None) -> int | None:
    """SQLite's integers end at 2**63; a hostile program's cost need not."""
    return None if number is None else min(number, 2**63 - 1)


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat


def _json(value: Any) -> str:
    return json.dumps(value, default=str)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
