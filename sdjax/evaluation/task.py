r"""What a task is: problems by split, a prompt, two ways to read an answer, and a grade.

A task of your own is a class named by its import path, `--task mytasks:Riddles` or `task.name` of a
run's configuration; the folder that the command is called in is searched too. This one is whole:

    from sdjax.evaluation.task import Problem, Task

    class Riddles(Task):
        name = "riddles"

        def problems(self, split):
            return [Problem(id="1", kind="riddle", question="What has keys?", answer="piano")]

        def prompt(self, problem):
            return f"Riddle: {problem.question}\nIn one word:"

        def extract_strict(self, text):
            words = text.split()
            return words[0] if len(words) == 1 else None

        def extract_flexible(self, text):
            return text.split()[-1] if text.split() else None

        def grade(self, extracted, problem):
            return extracted.strip(".!").lower() == problem.answer

What a method raises, or gives of another type than told here, is a mistake that names the class,
and the problem; while outputs are read and graded, it is a failure of that problem alone.

A class that is made with keyword arguments named `development`, `test`, `shots` or `data` (fields
of a dataclass) gets them from the command line or the configuration.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdjax.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One problem, or a worked example.

    Attributes:
        id: unique in its task over all splits; paired intervals pair by it.
        kind: accuracies are told by kind.
        question, answer: what is asked, and what is right.
        solution: the answer with its working, as an example shows it; empty where there is none.
    """

    id: str
    kind: str
    question: str
    answer: str
    solution: str = ""

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise TypeError(f"{field.name} of a problem is {value!r}, not a text")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a model wrote for one problem and whether each reading of it is right.

    `strict` demands the format that the prompt showed; `flexible` takes the last thing that looks
    like an answer. Their difference tells a model that cannot solve from one that cannot format.
    `failure` says why a problem counts as wrong without having been solved wrongly: its prompt is
    too long, or grading it was given up.
    """

    problem_id: str
    output: str
    strict: bool
    flexible: bool
    strict_answer: str | None = None
    flexible_answer: str | None = None
    failure: str | None = None


class NotGradedError(Exception):
    """Grading an answer was given up; the message says why. It counts as wrong."""


class BrokenTaskError(UserError):
    """A task's class raised something, or gave what is of another type than asked for."""


class Task(ABC):
    """A task; one file each in `tasks/`. What is not abstract has a default to be replaced.

    Attributes:
        name: how a configuration, results and tables call it.
        stop: texts at the first of which an output ends.
        max_new_tokens: what `sdjax eval` lets a model write; a run's configuration has its own.
    """

    name: str
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256

    @abstractmethod
    def problems(self, split: str) -> list[Problem]:
        """The problems of "development" or "test", always in the same order."""

    @abstractmethod
    def prompt(self, problem: Problem) -> str:
        """The text that a model completes, or the user's message to it."""

    def examples(self, problem: Problem) -> Sequence[Problem]:
        """Worked examples to show before a problem, the same in every evaluation."""
        return ()

    def notes(self) -> Sequence[str]:
        """What a reader of the results is to know of the problems and examples, a line each."""
        return ()

    @abstractmethod
    def extract_strict(self, text: str) -> str | None:
        """The answer where the asked-for format is kept, else None."""

    @abstractmethod
    def extract_flexible(self, text: str) -> str | None:
        """The last thing that looks like an answer, or None."""

    @abstractmethod
    def grade(self, extracted: str, problem: Problem) -> bool:
        """Whether an extracted answer is right. May raise NotGradedError. Several threads call."""


def call_checked(task: Task, method: str, kinds: tuple[type, ...], *arguments: Any) -> Any:
    """What a method of a task gives, which is of one of the kinds.

    Raises:
        BrokenTaskError: it is not, or the method raised what is no NotGradedError or UserError.
    """
    where = _where(task, method)
    try:
        found = getattr(task, method)(*arguments)
    except (NotGradedError, UserError):
        raise
    except Exception as error:  # whatever a user's class may raise
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BrokenTaskError(f"{where} raised {line}") from error
    if not isinstance(found, kinds):
        wanted = " or ".join(dict.fromkeys(kind.__name__ for kind in kinds))
        raise BrokenTaskError(f"{where} gave {type(found).__name__}, not {wanted}")
    return found


def problems_of(task: Task, split: str) -> list[Problem]:
    """A task's problems of a split. Raises BrokenTaskError where they are none."""
    found = call_checked(task, "problems", (list, tuple), split)
    for one in found:
        if not isinstance(one, Problem):
            where = _where(task, "problems")
            raise BrokenTaskError(f"{where} holds {one!r:.60}, which is no Problem")
    return list(found)


def grade_output(task: Task, problem: Problem, output: str) -> Outcome:
    """Reads and grades one completion both ways; nothing extracted counts as wrong."""
    text = truncate_at_stop(output, task.stop)
    answers: list[str | None] = []
    right: list[bool] = []
    failure = None
    for reading in ("extract_strict", "extract_flexible"):
        answer, verdict = None, False
        try:
            answer = call_checked(task, reading, (str, type(None)), text)
            if answer in answers:
                verdict = right[0]
            elif answer is not None:
                verdict = bool(call_checked(task, "grade", (bool, np.bool_), answer, problem))
        except (NotGradedError, BrokenTaskError) as error:
            failure = str(error)
        answers.append(answer)
        right.append(verdict)
    return Outcome(
        problem_id=problem.id,
        output=text,
        strict=right[0],
        flexible=right[1],
        strict_answer=answers[0],
        flexible_answer=answers[1],
        failure=failure,
    )


def _where(task: Task, method: str) -> str:
    return f"task {type(task).__module__}:{type(task).__qualname__}: {method}"


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text
