"""The store of a run, which commits every result as soon as it is available.

A folder contains one run, in one SQLite file. The tables are derived from the records in
`sdjax.search.types`. Each `save_…` method is one commit. Duplicates and accuracies are computed on
reading, so they do not depend on interruptions or on the order in which results arrive.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from flax.traverse_util import flatten_dict

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Outcome
from sdjax.sandbox.verdict import ADMITTED, DUPLICATE, DuplicateIndex, is_admissible
from sdjax.search.database import Database, now
from sdjax.search.tables import TABLES
from sdjax.search.types import (
    MAIN,
    NO_PROGRAM,
    NOT_JUDGED,
    SEARCH,
    Application,
    Checkpoint,
    Entry,
    Evaluation,
    JudgedSample,
    Lineage,
    Phase,
    Program,
    Prompt,
    RunRecord,
    Sample,
    Setting,
    StoredOutcome,
    StoredPair,
    StoredVerdict,
    Summary,
    program_entry,
    storable,
    text_hash,
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
    ) -> Store:
        """Create the store of a new run in a folder.

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
        schema = "\n".join(table.schema() for table in TABLES.values())
        table = TABLES[RunRecord]
        return cls(Database.create(Path(folder), schema, (table.insert(), table.encode(run))))

    @classmethod
    def open(cls, folder: Path, *, write: bool = False) -> Store:
        """Open the run in a folder. A run has one writer at a time and any number of readers.

        Raises:
            UserError: the run is missing, damaged or of another version, or another process is
                writing to it (only with `write`).
        """
        return cls(Database.open(Path(folder), write=write))

    @classmethod
    def mirror(cls, folder: Path, content: bytes) -> Store:
        """Return an in-memory store, initialized with the `content` of the folder's store."""
        return cls(Database.mirror(Path(folder), content))

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

    def _insert(self, *records: Any, on_conflict: str = "fail") -> None:
        with self._database.transaction() as connection:
            _execute_inserts(connection, records, on_conflict)

    def _select(self, record: type[T], rest: str = "ORDER BY rowid", *values: Any) -> list[T]:
        table = TABLES[record]
        rows = self._database.read(f"SELECT * FROM {table.name} {rest}", values)
        return [table.decode(row) for row in rows]

    # The run

    def run(self) -> RunRecord:
        """Return the run's record."""
        runs = self._select(RunRecord)
        if not runs:
            raise UserError(
                f"{self._database.path}: the table `run` is empty; start over with another --out"
            )
        return runs[0]

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raise UserError with the first different key if `config` is not the run's config."""
        stored = self.run()
        if config_fingerprint(config) == stored.fingerprint:
            return
        new = flatten_dict(json.loads(json.dumps(config, default=str)), sep=".")
        old = flatten_dict(dict(stored.config), sep=".")
        for key in sorted(new.keys() | old.keys()):
            if new.get(key) != old.get(key):
                raise UserError(
                    f"{self.folder}: contains a run with {key} = {old.get(key)!r}, not "
                    f"{new.get(key)!r}; resume it with its own config, or choose another --out"
                )

    def finish(self) -> None:
        """Mark the run as finished."""
        with self._database.transaction() as connection:
            connection.execute("UPDATE run SET finished_at = ?", (now(),))

    def save_setting(self, setting: Setting) -> None:
        """Save a setting. Raises ValueError if a different one has the same name."""
        self._insert(setting, on_conflict="ignore")
        if setting not in self.settings():
            raise ValueError(
                f"a different setting {setting.name!r} is already in {self._database.path}"
            )

    def settings(self) -> tuple[Setting, ...]:
        """Return the settings in the order in which they were saved."""
        return tuple(self._select(Setting))

    def save_lineage(self, lineage: Lineage) -> None:
        """Save the lineage of an iteration."""
        self._insert(lineage, on_conflict="update")

    def lineage(self) -> tuple[Lineage, ...]:
        """Return the lineage, sorted by iteration."""
        return tuple(self._select(Lineage, "ORDER BY iteration"))

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Record a checkpoint whose files are complete."""
        self._insert(checkpoint, on_conflict="update")

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Return the checkpoints, sorted by iteration."""
        return tuple(self._select(Checkpoint, "ORDER BY iteration, name"))

    def save_phase(self, iteration: int, name: str, seconds: float) -> None:
        """Record that a phase of an iteration is complete."""
        phase = Phase(iteration=iteration, name=name, seconds=seconds, finished_at=now())
        self._insert(phase, on_conflict="update")

    def phases(self) -> dict[tuple[int, str], float]:
        """Return the duration in seconds by (iteration, phase), in the order of completion."""
        phases = self._select(Phase, "ORDER BY finished_at, rowid")
        return {(phase.iteration, phase.name): phase.seconds for phase in phases}

    # Samples and programs

    def save_prompt(self, name: str, text: str) -> str:
        """Save a prompt and return its hash."""
        prompt = Prompt(hash=text_hash(text), name=name, text=text)
        self._insert(prompt, on_conflict="ignore")
        return prompt.hash

    def prompts(self) -> dict[str, str]:
        """Return the prompts by hash."""
        return {prompt.hash: prompt.text for prompt in self._select(Prompt)}

    def save_samples(self, samples: Iterable[Sample]) -> None:
        """Save all samples in one commit. Raises sqlite3.IntegrityError if one already exists."""
        self._insert(*samples)

    def sample_numbers(self, iteration: int, purpose: str = SEARCH) -> set[int]:
        """Return the numbers of an iteration's samples."""
        query = "SELECT number FROM sample WHERE purpose = ? AND iteration = ?"
        return {row["number"] for row in self._database.read(query, (purpose, iteration))}

    def save_verdict(self, verdict: StoredVerdict, program: Program | None = None) -> None:
        """Save the verdict on a candidate, and its program if it is admissible.

        Existing verdicts and programs are not overwritten.
        """
        records = [verdict] if program is None else [verdict, program]
        self._insert(*records, on_conflict="ignore")

    def verdict_of(self, source: str) -> StoredVerdict | None:
        """Return the verdict on a candidate, or None if it has not been judged yet."""
        verdicts = self._select(StoredVerdict, "WHERE source = ?", storable(source))
        return verdicts[0] if verdicts else None

    def verdicts(self) -> dict[str, StoredVerdict]:
        """Return the verdicts by source."""
        return {verdict.source: verdict for verdict in self._select(StoredVerdict)}

    def programs(self) -> dict[str, Program]:
        """Return the programs by identity, in the order in which they were admitted."""
        return {program.identity: program for program in self._select(Program)}

    def program(self, identity: str) -> Program:
        """Return the program with an identity. Raises KeyError if it does not exist."""
        programs = self._select(Program, "WHERE identity = ?", identity)
        if not programs:
            raise KeyError(identity)
        return programs[0]

    def judged(self, iteration: int | None = None, purpose: str = SEARCH) -> list[JudgedSample]:
        """Return the samples of a purpose with their statuses, in sampling order.

        A program is "admitted" at its first sample over all iterations of the purpose and a
        "duplicate" afterwards, regardless of the order in which the verdicts were saved.
        """
        verdicts, duplicates = self.verdicts(), DuplicateIndex()
        fingerprints = {
            row["identity"]: row["fingerprint"]
            for row in self._database.read("SELECT identity, fingerprint FROM program")
        }
        setting_of = {generator.iteration: generator.setting for generator in self.lineage()}
        applications = {
            (application.entry, application.setting): application
            for application in self._select(Application)
        }
        judged = []
        samples = self._select(Sample, "WHERE purpose = ? ORDER BY iteration, number", purpose)
        for sample in samples:
            verdict = verdicts.get(sample.source or "")
            application = None
            if verdict is not None and verdict.identity is not None:
                name = program_entry(verdict.identity)
                application = applications.get((name, setting_of.get(sample.iteration, MAIN)))
            status = _status(sample, verdict, application, duplicates, fingerprints)
            if iteration is None or sample.iteration == iteration:
                judged.append(_judged(sample, *status))
        return judged

    # Scores and pairs

    def save_entry(self, entry: Entry) -> None:
        """Save an entry, unless it already exists."""
        self._insert(entry, on_conflict="ignore")

    def entries(self) -> dict[str, Entry]:
        """Return the entries by name, in the order in which they were saved."""
        return {entry.name: entry for entry in self._select(Entry)}

    def save_application(self, application: Application) -> None:
        """Save the result of applying an entry; a non-finite change is saved as 0."""
        change = application.change if math.isfinite(application.change) else 0.0
        application = dataclasses.replace(application, change=change)
        self._insert(application, on_conflict="update")

    def applications(self, setting: str = MAIN) -> dict[str, Application]:
        """Return the results of applying entries in a setting, by entry name."""
        applications = self._select(Application, "WHERE setting = ?", setting)
        return {application.entry: application for application in applications}

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
            split: "development" or "test".
            outcomes: outcomes of problems that do not have one yet.
            complete: whether these outcomes complete the evaluation.
            setting: name of a saved setting.

        Raises:
            ValueError: the evaluation is already complete; test problems are scored only once.
            sqlite3.IntegrityError: a problem already has an outcome.
        """
        key = {"entry": entry, "setting": setting, "split": split}
        where = " AND ".join(f"{name} = :{name}" for name in key)
        with self._database.transaction() as connection:
            row = connection.execute(f"SELECT complete FROM evaluation WHERE {where}", key)
            if (row.fetchone() or {"complete": False})["complete"]:
                raise ValueError(f"{entry} in {setting} on {split} is already scored")
            _execute_inserts(connection, [Evaluation(**key, complete=complete)], "update")
            scores = [StoredOutcome(**key, outcome=outcome) for outcome in outcomes]
            _execute_inserts(connection, scores)

    def is_complete(self, entry: str, split: str, setting: str = MAIN) -> bool:
        """Return whether an evaluation is complete."""
        where = "WHERE entry = ? AND split = ? AND setting = ?"
        return any(
            evaluation.complete
            for evaluation in self._select(Evaluation, where, entry, split, setting)
        )

    def outcomes(self, entry: str, split: str, setting: str = MAIN) -> tuple[Outcome, ...]:
        """Return the outcomes of an evaluation, sorted by problem id; may be empty."""
        where = "WHERE entry = ? AND setting = ? AND split = ? ORDER BY outcome_problem_id"
        return tuple(
            score.outcome for score in self._select(StoredOutcome, where, entry, setting, split)
        )

    def summaries(self, split: str | None = None, setting: str | None = MAIN) -> list[Summary]:
        """Return the accuracies of the evaluations, in the order in which they were started.

        Args:
            split: split to select, or None for all splits.
            setting: setting to select, or None for all settings.
        """
        rows = self._database.read(
            """
            SELECT entry, setting, split, e.complete, count(*) AS problems,
                   avg(outcome_strict) AS strict, avg(outcome_flexible) AS flexible
            FROM evaluation e JOIN score USING (entry, setting, split)
            WHERE (?1 IS NULL OR split = ?1) AND (?2 IS NULL OR setting = ?2)
            GROUP BY e.rowid ORDER BY e.rowid
            """,
            (split, setting),
        )
        return [Summary(**{**dict(row), "complete": bool(row["complete"])}) for row in rows]

    def save_pairs(self, pairs: Iterable[StoredPair]) -> None:
        """Save an iteration's pairs in one commit. Raises sqlite3.IntegrityError if it has any."""
        self._insert(*pairs)

    def pairs(self, iteration: int | None = None) -> list[StoredPair]:
        """Return the pairs of an iteration, or of all iterations, in order."""
        where = "WHERE ?1 IS NULL OR iteration = ?1 ORDER BY iteration, number"
        return self._select(StoredPair, where, iteration)


def config_fingerprint(config: Mapping[str, Any]) -> str:
    """Return a hash of a config's JSON form."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _execute_inserts(
    connection: sqlite3.Connection, records: Iterable[Any], on_conflict: str = "fail"
) -> None:
    for record in records:
        table = TABLES[type(record)]
        connection.execute(table.insert(on_conflict), table.encode(record))


def _status(
    sample: Sample,
    verdict: StoredVerdict | None,
    application: Application | None,
    duplicates: DuplicateIndex,
    fingerprints: Mapping[str, str | None],
) -> tuple[str, str, str | None]:
    """Return the status, rule and identity of a sample; add its program to `duplicates`."""
    if sample.source is None:
        return NO_PROGRAM, "no program in the text", None
    if verdict is None:
        return NOT_JUDGED, "", None
    if not is_admissible(verdict.verdict) or verdict.identity is None:
        return verdict.verdict, verdict.rule, None
    if application is not None and not application.admitted:
        return application.verdict, application.rule, None
    fingerprint = fingerprints.get(verdict.identity)
    original = duplicates.add(verdict.identity, fingerprint, verdict.identity)
    return (DUPLICATE, "", original) if original else (ADMITTED, "", verdict.identity)


def _judged(sample: Sample, status: str, rule: str, identity: str | None) -> JudgedSample:
    values = {field.name: getattr(sample, field.name) for field in dataclasses.fields(sample)}
    return JudgedSample(**values, status=status, rule=rule, identity=identity)
