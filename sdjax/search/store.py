"""The store of a run, which commits every result as soon as it is available.

A folder contains one run, in one SQLite file. The tables are derived from the records in
`sdjax.search.types` and `sdjax.search.score_types`. Each save is one commit. Duplicates and
accuracies are computed on reading, so they do not depend on interruptions or on the order in which
results arrive.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from sdjax.core.errors import UserError, truncated_repr
from sdjax.evaluation.task import Outcome
from sdjax.sandbox.verdict import DuplicateIndex
from sdjax.search.base_identity import base_of_iteration, on_base
from sdjax.search.config import RunConfig, config_from
from sdjax.search.database import Database, now
from sdjax.search.sample_status import judged_sample
from sdjax.search.schema import TABLES, migrations, schema
from sdjax.search.score_types import (
    Application,
    CandidateOutcome,
    Evaluation,
    Promotion,
    StoredOutcome,
    Summary,
)
from sdjax.search.types import (
    MAIN,
    SEARCH,
    Attempt,
    Change,
    JudgedSample,
    Lineage,
    Phase,
    Program,
    Prompt,
    RunInput,
    RunRecord,
    Sample,
    Setting,
    StoredVerdict,
    UnfinishedPhase,
    program_entry,
)

T = TypeVar("T")


class Store:
    """Typed access to a run's database; a context manager."""

    def __init__(self, database: Database) -> None:
        """Wrap an open database; call `create`, `open` or `mirror` instead."""
        self._database = database

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        config: Mapping[str, Any],
        versions: Mapping[str, str],
        layers: Sequence[str],
        inputs: Mapping[str, str] | None = None,
    ) -> Store:
        """Create the store of a new run in a folder.

        Args:
            folder: the run folder.
            config: the `RunConfig`, as JSON-compatible data.
            versions: see `sdjax.core.versions`.
            layers: active confinement layers of the sandbox.
            inputs: fingerprint by name of input; see `sdjax.search.provenance`.

        Raises:
            UserError: the folder already contains a run or cannot be written.
        """
        run = RunRecord(
            config=config,
            fingerprint=config_fingerprint(config),
            versions=versions,
            layers=tuple(layers),
            started_at=now(),
        )
        records = [run, *(RunInput(name=n, fingerprint=f) for n, f in (inputs or {}).items())]
        rows = [(TABLES[type(r)].insert, TABLES[type(r)].encode(r)) for r in records]
        return cls(Database.create(Path(folder), schema, rows))

    @classmethod
    def open(cls, folder: Path, *, write: bool = False) -> Store:
        """Open the run in a folder. A run has one writer at a time and any number of readers.

        Raises:
            UserError: the run is missing, damaged or of another version, or another process is
                writing to it (only with `write`).
        """
        return cls(Database.open(Path(folder), write=write, schema=schema, migrations=migrations()))

    @classmethod
    def mirror(cls, folder: Path, content: bytes) -> Store:
        """Return an in-memory store, initialized with the `content` of the folder's store."""
        return cls(Database.mirror(Path(folder), content, schema=schema))

    def content(self) -> bytes:
        """Return the serialized store, for `mirror`."""
        return self._database.content()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the database."""
        self._database.close()

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self._database.folder

    def save(self, *records: Any) -> None:
        """Save records in one commit.

        A record whose key exists is an error, ignored, or an update; see `Table.on_conflict`.

        Raises:
            sqlite3.IntegrityError: a record already exists, or refers to one that does not.
        """
        with self._database.transaction() as connection:
            for record in records:
                table = TABLES[type(record)]
                connection.execute(table.insert, table.encode(record))

    def delete(self, record: type, **where: Any) -> None:
        """Delete the records of a class whose columns equal `where`."""
        table = TABLES[record]
        condition = " AND ".join(f"{name} = ?" for name in where)
        with self._database.transaction() as connection:
            connection.execute(f"DELETE FROM {table.name} WHERE {condition}", tuple(where.values()))

    def select(self, record: type[T], **where: Any) -> tuple[T, ...]:
        """Return the records of a class whose columns equal `where`, in `Table.order`.

        Raises:
            UserError: a row is damaged.
        """
        table = TABLES[record]
        if table.since > self._database.version:
            return ()
        return self._decode(table.decode, self._database.read(*table.select(**where)))

    def values(self, record: type, *names: str, **where: Any) -> Iterator[list[Any]]:
        """Return some columns of the selected records, without reading the others."""
        table = TABLES[record]
        columns = [column for column in table.columns if column.name in names]
        rows = self._database.read(*table.select(", ".join(c.name for c in columns), **where))
        return iter(self._decode(lambda row: table.decode_cells(row, columns), rows))

    def _decode(self, decode: Callable[[Any], T], rows: Iterable[Any]) -> tuple[T, ...]:
        """Decode rows; the file may be damaged, or somebody else may have written it."""
        try:
            return tuple(map(decode, rows))
        except ValueError as error:
            raise _damaged(self._database.path, error) from None

    def by_key(self, record: type[T], **where: Any) -> dict[str, T]:
        """Return the selected records by the first column of their key."""
        key = TABLES[record].key[0]
        return {getattr(row, key): row for row in self.select(record, **where)}

    # The run

    def run(self) -> RunRecord:
        """Return the run's record."""
        runs = self.select(RunRecord)
        if not runs:
            raise UserError(
                f"{self._database.path}: the table `run` is empty; start over with another --out"
            )
        return runs[0]

    def config(self) -> RunConfig:
        """Return the run's config."""
        return config_from(self.run().config, f"{self.folder}: its config")

    def scores_structures(self) -> bool:
        """Return whether a program's score is what its structure reaches with tuned constants."""
        return self.run().config.get("score") == "tuned"

    def amend(
        self,
        *,
        config: Mapping[str, Any],
        versions: Mapping[str, str],
        inputs: Iterable[RunInput],
        changes: Iterable[Change] = (),
    ) -> None:
        """Update the run's config, versions and inputs, and record the changes, in one commit.

        A run whose config has changed is unfinished.
        """
        run = self.run()
        fingerprint = config_fingerprint(config)
        run = dataclasses.replace(
            run,
            config=config,
            fingerprint=fingerprint,
            versions=versions,
            finished_at=run.finished_at if fingerprint == run.fingerprint else None,
        )
        table = TABLES[RunRecord]
        assignments = ", ".join(f"{column.name} = ?" for column in table.columns)
        changed_at = now()
        with self._database.transaction() as connection:
            connection.execute(f"UPDATE run SET {assignments}", table.encode(run))
            for record in (
                *inputs,
                *(dataclasses.replace(change, changed_at=changed_at) for change in changes),
            ):
                connection.execute(TABLES[type(record)].insert, TABLES[type(record)].encode(record))

    def finish(self) -> None:
        """Mark the run as finished, unless it is."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE run SET finished_at = ? WHERE finished_at IS NULL", (now(),))

    def save_setting(self, setting: Setting) -> None:
        """Save a setting. Raises ValueError if a different one has the same name."""
        self.save(setting)
        if setting not in self.select(Setting):
            raise ValueError(
                f"a different setting {setting.name!r} is already in {self._database.path}"
            )

    def save_phase(self, iteration: int, name: str, seconds: float) -> None:
        """Record that a phase of an iteration is complete."""
        phase = Phase(iteration=iteration, name=name, seconds=seconds, finished_at=now())
        table = TABLES[Phase]
        with self._database.transaction() as connection:
            connection.execute(table.insert, table.encode(phase))
            connection.execute(
                "DELETE FROM unfinished_phase WHERE iteration = ? AND name = ?", (iteration, name)
            )

    def phases(self) -> dict[tuple[int, str], float]:
        """Return the duration in seconds by (iteration, phase), in the order of completion."""
        return {(phase.iteration, phase.name): phase.seconds for phase in self.select(Phase)}

    def unfinished_phases(self) -> dict[tuple[int, str], float]:
        """Return the seconds spent so far by (iteration, phase) that has not ended."""
        found = self.select(UnfinishedPhase)
        return {(phase.iteration, phase.name): phase.seconds for phase in found}

    # Samples and programs

    def save_prompt(self, name: str, text: str) -> str:
        """Save a prompt and return its hash."""
        prompt = Prompt.of(name, text)
        self.save(prompt)
        return prompt.hash

    def prompts(self) -> dict[str, str]:
        """Return the prompts by hash."""
        return {prompt.hash: prompt.text for prompt in self.select(Prompt)}

    def sample_numbers(self, iteration: int, purpose: str = SEARCH) -> set[int]:
        """Return the numbers of an iteration's samples."""
        values = self.values(Sample, "number", purpose=purpose, iteration=iteration)
        return {number for (number,) in values}

    def program(self, identity: str) -> Program:
        """Return the program with an identity."""
        programs = self.select(Program, identity=identity)
        if not programs:
            name = truncated_repr(identity[:12])
            raise _damaged(self._database.path, f"table program, column identity: no {name}")
        return programs[0]

    def judged(self, iteration: int | None = None, purpose: str = SEARCH) -> list[JudgedSample]:
        """Return the samples of a purpose with their statuses, in sampling order.

        A program is "admitted" at its first sample over all iterations of the purpose and a
        "duplicate" afterwards, regardless of the order in which the verdicts were saved. In a run
        that scores structures, all programs of one structure are one.
        """
        by_structure = self.scores_structures()
        verdicts, earlier = self.by_key(StoredVerdict), DuplicateIndex()
        fingerprints = dict(self.values(Program, "identity", "fingerprint"))
        setting_of = {generator.iteration: generator.setting for generator in self.select(Lineage)}
        promotions = self.select(Promotion)
        applications = {
            (application.entry, application.setting): application
            for application in self.select(Application)
        }
        judged = []
        for sample in self.select(Sample, purpose=purpose):
            verdict = verdicts.get(sample.source or "")
            if verdict is not None and promotions:
                base = base_of_iteration(promotions, purpose, sample.iteration)
                verdict = on_base(verdict, base)
            application = None
            if verdict is not None and verdict.identity is not None:
                name = program_entry(verdict.identity)
                application = applications.get((name, setting_of.get(sample.iteration, MAIN)))
            one = judged_sample(
                *(sample, verdict, application, earlier, fingerprints), by_structure=by_structure
            )
            if iteration is None or sample.iteration == iteration:
                judged.append(one)
        return judged

    # Scores and pairs

    def save_scores(
        self,
        entry: str,
        split: str,
        outcomes: Iterable[Outcome],
        *,
        complete: bool = True,
        setting: str = MAIN,
    ) -> None:
        """Add outcomes to the evaluation of an entry in a setting on a split, in one commit.

        Args:
            entry: name of a saved entry.
            split: "development", "confirmation" or "test".
            outcomes: outcomes of problems that do not have one yet.
            complete: whether these outcomes complete the evaluation.
            setting: name of a saved setting.

        Raises:
            ValueError: the evaluation is already complete; test problems are scored only once.
            sqlite3.IntegrityError: a problem already has an outcome.
        """
        if self.is_complete(entry, split, setting):
            raise ValueError(f"{entry} in {setting} on {split} is already scored")
        key = {"entry": entry, "setting": setting, "split": split}
        scores = (StoredOutcome(**key, outcome=outcome) for outcome in outcomes)
        self.save(Evaluation(**key, complete=complete), *scores)

    def is_complete(self, entry: str, split: str, setting: str = MAIN) -> bool:
        """Return whether an evaluation is complete."""
        evaluations = self.select(Evaluation, entry=entry, split=split, setting=setting)
        return any(evaluation.complete for evaluation in evaluations)

    @contextlib.contextmanager
    def attempt(self, entry: str, setting: str) -> Iterator[int]:
        """Record that the block is in progress, in case that it kills this process.

        Yields:
            the number of this attempt: one more than the processes that were killed in the block.
        """
        killed = self.select(Attempt, entry=entry, setting=setting)
        number = killed[0].number + 1 if killed else 1
        self.save(Attempt(entry=entry, setting=setting, number=number))
        try:
            yield number
        finally:
            self.delete(Attempt, entry=entry, setting=setting)

    def outcomes(self, entry: str, split: str, setting: str = MAIN) -> tuple[Outcome, ...]:
        """Return the outcomes of an evaluation, sorted by problem id; may be empty."""
        stored = self.select(StoredOutcome, entry=entry, split=split, setting=setting)
        return tuple(score.outcome for score in stored)

    def candidate_problems(self) -> dict[str, int]:
        """Return how many problems the candidates of each structure have answered together."""
        if TABLES[CandidateOutcome].since > self._database.version:
            return {}
        query = "SELECT structure, count(*) AS problems FROM candidate_score GROUP BY structure"
        return {row["structure"]: row["problems"] for row in self._database.read(query)}

    def summaries(self, split: str | None = None, setting: str | None = MAIN) -> list[Summary]:
        """Return the accuracies of the evaluations, in the order in which they were started.

        Args:
            split: split to select, or None for all splits.
            setting: setting to select, or None for all settings.
        """
        rows = self._database.read(
            """
            SELECT entry, setting, split, count(*) AS problems,
                   avg(outcome_strict IS TRUE) AS strict, avg(outcome_flexible IS TRUE) AS flexible
            FROM score
            WHERE (?1 IS NULL OR split = ?1) AND (?2 IS NULL OR setting = ?2)
            GROUP BY entry, setting, split
            """,
            (split, setting),
        )
        means = {(row["entry"], row["setting"], row["split"]): dict(row) for row in rows}
        keys = {(e.entry, e.setting, e.split): e.complete for e in self.select(Evaluation)}
        return [Summary(**means[key], complete=keys[key]) for key in keys if key in means]


def _damaged(path: Path, reason: object) -> UserError:
    return UserError(
        f"{path}: {reason}; the file is damaged or was changed: restore it from a backup, or start "
        "over with another --out"
    )


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """Return a hash of a config's JSON form."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]
