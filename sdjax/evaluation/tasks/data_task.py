"""What tasks whose problems are rows of a data set have in common: splits and worked examples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import ClassVar

from sdjax.core.errors import UserError
from sdjax.evaluation.data import TEST, TRAIN, Hub, Row, read_rows
from sdjax.evaluation.task import Problem, Task
from sdjax.evaluation.tasks.fixed import fixed_examples

# lm-evaluation-harness's `--seed` for worked examples.
_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class DataTask(Task):
    """Rows of a user's file or of the hub; see `sdjax.evaluation.data`.

    The first `development` rows of the test split are for development, the next `test` rows for
    the test. Worked examples come from the train split: as lm-evaluation-harness does by default,
    a generator with the seed 1234 draws `shots` of its rows anew for each row of the test split, in
    order; so a problem has the same examples whatever part of the split is scored.

    Attributes:
        data: the user's file or folder; None asks the hub.
        shots: worked examples before each problem.
        development: rows for development; by default half of them.
        test: at most so many rows for the test; by default all that are left.
    """

    hub: ClassVar[Hub | None] = None
    fixed: ClassVar[str | None] = None  # examples (fixed.py) for data without a train split
    fields: ClassVar[tuple[str, ...]]

    data: Path | None = None
    shots: int = 0
    development: int | None = None
    test: int | None = None

    @abstractmethod
    def problem(self, row: Row, id: str) -> Problem:
        """A row as a problem."""

    def problems(self, split: str) -> list[Problem]:
        rows = self._tested
        middle = len(rows) // 2 if self.development is None else self.development
        if middle > len(rows):
            raise UserError(
                f"task {self.name}: has {len(rows)} problems, fewer than the {middle} that "
                "task.development asks for"
            )
        if split == "development":
            return rows[:middle]
        return rows[middle:] if self.test is None else rows[middle : middle + self.test]

    def examples(self, problem: Problem) -> Sequence[Problem]:
        return self._drawn[problem.id] if self.shots else ()

    @cached_property
    def _tested(self) -> list[Problem]:
        return self._read(TEST)

    def notes(self) -> Sequence[str]:
        if self.shots and self.fixed and not self._pool:
            return [f"no train split beside {self.data}: the examples are {self.fixed}'s"]
        return ()

    @cached_property
    def _pool(self) -> list[Problem]:
        return self._read(TRAIN)

    @cached_property
    def _drawn(self) -> dict[str, list[Problem]]:
        """By the id of each test problem, its examples."""
        if not self._pool and self.fixed is not None:
            same = fixed_examples(self.fixed, self.shots)
            return {problem.id: same for problem in self._tested}
        if len(self._pool) < self.shots:
            raise UserError(
                f"task {self.name}: has {len(self._pool)} worked examples to show, not the "
                f"{self.shots} asked for; put a train split beside the data "
                f"(x_{TRAIN}.jsonl beside x_{TEST}.jsonl, or {TRAIN}.jsonl in the folder), "
                "or ask for fewer shots"
            )
        draw = Random(_SEED)
        return {problem.id: draw.sample(self._pool, self.shots) for problem in self._tested}

    def _read(self, split: str) -> list[Problem]:
        rows = read_rows(self.name, self.data, self.hub, split, self.fields)
        return [self.problem(row, f"{split}-{index}") for index, row in enumerate(rows)]
