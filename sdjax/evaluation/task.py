"""What a task is: problems by split, a prompt, two ways to read an answer, and a grade."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem. `id` is unique in its task over all splits; paired intervals pair by it."""

    id: str
    kind: str
    question: str
    answer: str


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a model wrote for one problem and whether each reading of it is right.

    `strict` demands the format that the prompt showed; `flexible` takes the last thing that looks
    like an answer. Their difference tells a model that cannot solve from one that cannot format.
    """

    problem_id: str
    output: str
    strict: bool
    flexible: bool


class Task(Protocol):
    """A task; one file each in this room."""

    @property
    def name(self) -> str: ...

    def problems(self, split: str) -> list[Problem]:
        """The problems of "development" or "test", always in the same order."""
        ...

    def prompt(self, problem: Problem) -> str:
        """The text that a model completes."""
        ...

    def extract_strict(self, text: str) -> str | None:
        """The answer where the asked-for format is kept, else None."""
        ...

    def extract_flexible(self, text: str) -> str | None:
        """The last thing that looks like an answer, or None."""
        ...

    def grade(self, extracted: str, problem: Problem) -> bool:
        """Whether an extracted answer is right."""
        ...


def grade_output(task: Task, problem: Problem, output: str) -> Outcome:
    """Reads and grades one completion both ways; nothing extracted counts as wrong."""
    strict = task.extract_strict(output)
    flexible = task.extract_flexible(output)
    return Outcome(
        problem_id=problem.id,
        output=output,
        strict=strict is not None and task.grade(strict, problem),
        flexible=flexible is not None and task.grade(flexible, problem),
    )
