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

A class that is made with keyword arguments named `development`, `test`, `shots` or `data` (fields
of a dataclass) gets them from the command line or the configuration.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass


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


def grade_output(task: Task, problem: Problem, output: str) -> Outcome:
    """Reads and grades one completion both ways; nothing extracted counts as wrong."""
    text = until(output, task.stop)
    answers = (task.extract_strict(text), task.extract_flexible(text))
    right: list[bool] = []
    failure = None
    for answer in answers:
        if right and answer == answers[0]:
            right.append(right[0])
            continue
        try:
            right.append(answer is not None and task.grade(answer, problem))
        except NotGradedError as error:
            right.append(False)
            failure = str(error)
    return Outcome(
        problem_id=problem.id,
        output=text,
        strict=right[0],
        flexible=right[1],
        strict_answer=answers[0],
        flexible_answer=answers[1],
        failure=failure,
    )


def until(text: str, stops: Sequence[str]) -> str:
    """The text before the first of `stops`."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text
