"""Base class of tasks whose problems are rows of a dataset: splits and worked examples."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from random import Random
from typing import ClassVar

from sdjax.core.errors import UserError
from sdjax.evaluation.data import TEST, TRAIN, DataRow, HubDataset, read_rows
from sdjax.evaluation.task import Problem, Task
from sdjax.evaluation.tasks.fixed import fixed_examples

# Seed of lm-evaluation-harness for sampling worked examples.
_FEWSHOT_SEED = 1234


@dataclass(frozen=True, kw_only=True)
class DataTask(Task):
    """A task whose rows come from the user's file or the hub; see `sdjax.evaluation.data`.

    The first `development` rows of the test split are for development, and the next `test` rows for
    testing. Worked examples come from the train split. As in lm-evaluation-harness by default, a
    random generator with seed 1234 samples `shots` rows for each row of the test split in order, so
    the examples of a problem do not depend on which problems are evaluated.

    Attributes:
        hub: dataset on the hub, if any.
        fixed: name of the fixed examples for data without a train split, if any.
        fields: fields that every row must have.
        data: the user's file or folder; None reads from the hub.
        shots: number of worked examples before each problem.
        development: number of rows for development; half of all rows by default.
        test: number of rows for testing; all remaining rows by default.
    """

    hub: ClassVar[HubDataset | None] = None
    fixed: ClassVar[str | None] = None
    fields: ClassVar[tuple[str, ...]]

    data: Path | None = None
    shots: int = 0
    development: int | None = None
    test: int | None = None

    @abstractmethod
    def problem(self, row: DataRow, id: str) -> Problem:
        """Convert a row to a problem."""

    def problems(self, split: str) -> list[Problem]:
        """Return the problems of a split.

        Raises:
            UserError: the data cannot be read, or has fewer than `development` plus `test`
                problems.
        """
        rows = self._test_rows
        middle = len(rows) // 2 if self.development is None else self.development
        if middle > len(rows):
            raise UserError(
                f"task {self.name}: only {len(rows)} problems, but task.development is {middle}; "
                "lower it"
            )
        if split == "development":
            return rows[:middle]
        if self.test is None:
            return rows[middle:]
        if middle + self.test > len(rows):
            raise UserError(
                f"task {self.name}: task.test is {self.test}, but only {len(rows) - middle} of "
                f"{len(rows)} problems are left after {middle} for development; lower it"
            )
        return rows[middle : middle + self.test]

    def examples(self, problem: Problem) -> Sequence[Problem]:
        """Return the worked examples of a problem."""
        return self._examples_by_id[problem.id] if self.shots else ()

    @cached_property
    def _test_rows(self) -> list[Problem]:
        return self._read(TEST)

    def notes(self) -> Sequence[str]:
        """Return a note if fixed worked examples replace a missing train split."""
        if self.shots and self.fixed and not self._train_rows:
            return [
                f"no train split next to {self.data}: using the worked examples of {self.fixed}"
            ]
        return ()

    def training(self) -> list[Problem]:
        """Return the rows of the train split, if there is one."""
        return self._train_rows

    @cached_property
    def _train_rows(self) -> list[Problem]:
        return self._read(TRAIN)

    @cached_property
    def _examples_by_id(self) -> dict[str, list[Problem]]:
        if not self._train_rows and self.fixed is not None:
            shared = fixed_examples(self.fixed, self.shots)
            return {problem.id: shared for problem in self._test_rows}
        if len(self._train_rows) < self.shots:
            raise UserError(
                f"task {self.name}: only {len(self._train_rows)} worked examples, but shots is "
                f"{self.shots}; add a train split to the data (x_{TRAIN}.jsonl next to "
                f"x_{TEST}.jsonl, or {TRAIN}.jsonl in the folder), or lower shots"
            )
        rng = Random(_FEWSHOT_SEED)
        return {problem.id: rng.sample(self._train_rows, self.shots) for problem in self._test_rows}

    def _read(self, split: str) -> list[Problem]:
        rows = read_rows(self.name, self.data, self.hub, split, self.fields)
        return [self.problem(row, f"{split}-{index}") for index, row in enumerate(rows)]
