"""A run's candidates, their scores, and the preference pairs made of them."""

import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from sdjax.evaluation.task import Outcome
from sdjax.search.database import Database, to_json
from sdjax.search.pairs import Pair, Scored
from sdjax.search.types import MAIN, Application, Candidate, OutcomeLike, Summary, storable


class ScoreTables:
    """Tables candidate, application, evaluation, score and pair."""

    _db: Database

    def save_candidate(self, candidate: Candidate) -> None:
        self._db.write(
            "INSERT INTO candidate VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (candidate.name, candidate.kind, candidate.identity, to_json(candidate.detail)),
        )

    def candidates(self) -> dict[str, Candidate]:
        rows = self._db.read("SELECT * FROM candidate ORDER BY rowid")
        return {
            row["name"]: Candidate(**{**dict(row), "detail": json.loads(row["detail"])})
            for row in rows
        }

    def save_application(self, application: Application) -> None:
        """Records what applying a candidate gave; a change that is not finite is kept as 0."""
        self._db.write(
            "INSERT OR REPLACE INTO application VALUES (?, ?, ?, ?, ?, ?, ?)",
            (
                application.candidate,
                application.setting,
                application.verdict,
                application.rule,
                application.message,
                float(application.change) if np.isfinite(application.change) else 0.0,
                application.seconds,
            ),
        )

    def applications(self, setting: str = MAIN) -> dict[str, Application]:
        """Candidate -> what applying it in a setting gave."""
        rows = self._db.read("SELECT * FROM application WHERE setting = ?", (setting,))
        return {row["candidate"]: Application(**dict(row)) for row in rows}

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

    def save_pairs(self, iteration: int, pairs: Sequence[Pair]) -> None:
        """Keeps an iteration's pairs, all or none. Raises sqlite3.IntegrityError if it has some."""
        self._db.write(
            f"INSERT INTO pair VALUES ({', '.join('?' * 12)})",
            *[
                (iteration, number, *_side(pair.winner), *_side(pair.loser))
                for number, pair in enumerate(pairs)
            ],
        )

    def pairs(self, iteration: int | None = None) -> list[dict[str, Any]]:
        """An iteration's pairs, or those of all, in order, as the table's rows."""
        rows = self._db.read(
            "SELECT * FROM pair WHERE ?1 IS NULL OR iteration = ?1 ORDER BY iteration, number",
            (iteration,),
        )
        return [dict(row) for row in rows]


def _side(program: Scored) -> tuple[str, int, str, str, float]:
    text = storable(program.text)
    return (program.identity, program.iteration, program.prompt, text, program.score)
