"""The tables of a run's database, one per record class, and the changes between its versions."""

from __future__ import annotations

from typing import Any

from sdjax.search.score_types import (
    Answer,
    Application,
    Candidate,
    CandidateOutcome,
    Comparison,
    Evaluation,
    Promotion,
    ScoredStructure,
    StoredOutcome,
    StoredPair,
    TestOpening,
)
from sdjax.search.tables import Table
from sdjax.search.types import (
    Attempt,
    Change,
    Checkpoint,
    Entry,
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
)

_ENTRY = {"entry": "entry(name)", "setting": "setting(name)"}
_EVALUATION = "entry, setting, split"

# Record class -> table.
TABLES: dict[type, Table[Any]] = {
    table.record: table
    for table in (
        Table(name="run", record=RunRecord),
        Table(name="input", record=RunInput, key=("name",), on_conflict="update", since=4),
        Table(name="change", record=Change, since=4),
        Table(name="setting", record=Setting, key=("name",), on_conflict="ignore"),
        Table(
            name="checkpoint",
            record=Checkpoint,
            key=("name",),
            order="iteration, name",
            on_conflict="update",
        ),
        Table(
            name="lineage",
            record=Lineage,
            key=("iteration",),
            order="iteration",
            on_conflict="update",
            references={"setting": "setting(name)", "checkpoint": "checkpoint(name)"},
        ),
        Table(
            name="phase",
            record=Phase,
            key=("iteration", "name"),
            order="finished_at, rowid",
            on_conflict="update",
        ),
        Table(
            name="unfinished_phase",
            record=UnfinishedPhase,
            key=("iteration", "name"),
            on_conflict="update",
            since=8,
        ),
        Table(name="prompt", record=Prompt, key=("hash",), on_conflict="ignore"),
        Table(
            name="sample",
            record=Sample,
            key=("purpose", "iteration", "number"),
            order="iteration, number",
            references={"prompt": "prompt(hash)"},
        ),
        Table(name="verdict", record=StoredVerdict, key=("source",), on_conflict="ignore"),
        Table(name="program", record=Program, key=("identity",), on_conflict="ignore"),
        Table(
            name="entry",
            record=Entry,
            key=("name",),
            on_conflict="update",
            references={"identity": "program(identity)"},
            # Earlier versions of the database lack "ablation", and their runs have none.
            constraints=("CHECK (kind IN ('seed', 'expert', 'method', 'program', 'ablation'))",),
        ),
        Table(
            name="application",
            record=Application,
            key=("entry", "setting"),
            on_conflict="update",
            references=_ENTRY,
        ),
        Table(
            name="attempt",
            record=Attempt,
            key=("entry", "setting"),
            on_conflict="update",
            since=4,
        ),
        Table(
            name="evaluation",
            record=Evaluation,
            key=("entry", "setting", "split"),
            on_conflict="update",
            references=_ENTRY,
        ),
        Table(
            name="score",
            record=StoredOutcome,
            key=("entry", "setting", "split", "outcome_problem_id"),
            order="outcome_problem_id",
            references={_EVALUATION: f"evaluation({_EVALUATION})"},
        ),
        Table(
            name="structure",
            record=ScoredStructure,
            key=("structure",),
            references=dict.fromkeys(("written", "best"), "program(identity)"),
            since=7,
        ),
        Table(
            name="candidate",
            record=Candidate,
            key=("structure", "number"),
            order="structure, number",
            since=7,
        ),
        Table(
            name="candidate_score",
            record=CandidateOutcome,
            key=("structure", "number", "outcome_problem_id"),
            order="structure, number, outcome_problem_id",
            references={"structure, number": "candidate(structure, number)"},
            since=7,
        ),
        Table(
            name="pair",
            record=StoredPair,
            key=("iteration", "number"),
            order="iteration, number",
            # A rejected sample may be without a program.
            references={
                "chosen_identity": "program(identity)",
                "chosen_prompt": "prompt(hash)",
                "rejected_prompt": "prompt(hash)",
            },
            constraints=("CHECK (chosen_identity <> rejected_identity)",),
        ),
        Table(
            name="promotion",
            record=Promotion,
            key=("purpose", "iteration"),
            references={"base": "entry(name)", "entry": "entry(name)"},
            since=8,
        ),
        Table(
            name="test_opening",
            record=TestOpening,
            key=("setting", "number"),
            order="setting, number",
            references={"setting": "setting(name)"},
            since=7,
        ),
        Table(
            name="comparison",
            record=Comparison,
            key=("opening", "program"),
            on_conflict="update",
            references={"program": "entry(name)", "control": "entry(name)"},
            since=7,
        ),
        Table(
            name="answer",
            record=Answer,
            key=("opening",),
            order="opening",
            on_conflict="update",
            since=7,
        ),
    )
}


def schema(version: int) -> str:
    """Return the CREATE statements of the tables that a version of the database has."""
    return "\n".join(table.schema() for table in TABLES.values() if table.since <= version)


def migrations() -> dict[int, str]:
    """Return the statements that lead from a version of a database to the next, by version."""

    def new_tables(version: int) -> str:
        return "\n".join(table.schema() for table in TABLES.values() if table.since == version)

    return {
        3: new_tables(4),
        4: "ALTER TABLE checkpoint DROP COLUMN role;",  # all checkpoints had the same one
        5: "ALTER TABLE application ADD COLUMN original TEXT;",
        6: new_tables(7),
        7: (
            f"{new_tables(8)} ALTER TABLE program ADD COLUMN base TEXT; "
            "ALTER TABLE lineage ADD COLUMN base TEXT; "
            "ALTER TABLE lineage ADD COLUMN generator_base TEXT; "
            "ALTER TABLE sample ADD COLUMN generator TEXT; "
            "ALTER TABLE sample ADD COLUMN parents TEXT; "
            "ALTER TABLE sample ADD COLUMN operation TEXT; "
            f"{_recreated(TABLES[StoredPair], new=('chosen_fault', 'rejected_fault'))}"
        ),
    }


def _recreated(table: Table[Any], *, new: tuple[str, ...]) -> str:
    """Return the statements that declare a table again, with new columns that are null."""
    names = ", ".join(column.name for column in table.columns if column.name not in new)
    return (
        f"ALTER TABLE {table.name} RENAME TO earlier; {table.schema()} "
        f"INSERT INTO {table.name} ({names}) SELECT {names} FROM earlier; DROP TABLE earlier;"
    )
