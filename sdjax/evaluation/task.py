r"""The interface of a task: problems, prompts, answer extraction and grading.

To use a task of your own, pass the import path of its class, as `--task mytasks:Riddles` or as
`task.name` in a run's config, and `--trust-code`, since it runs outside the sandbox. Its module
must be installed or in a folder of PYTHONPATH. A complete example:

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

If a method raises an exception or returns a value of the wrong type, the error message names the
class and the problem. During extraction and grading, only that problem fails.

If the class accepts keyword arguments named `development`, `test`, `shots` or `data` (such as
fields of a dataclass), they are set from the command line or the config.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sdjax.core.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Problem:
    """A problem, or a worked example.

    Attributes:
        id: unique in the task across all splits; paired comparisons match problems by id.
        kind: kind of the problem; accuracies are also reported per kind.
        question: text of the question.
        answer: the correct answer.
        solution: the answer with its derivation, as shown in a worked example; may be empty.
    """

    id: str
    kind: str
    question: str
    answer: str
    solution: str = ""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, str):
                raise TypeError(f"{field.name} of a problem must be a string, not {value!r}")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """The model's output for one problem, graded by two metrics.

    The difference between the metrics distinguishes a model that cannot solve a problem from one
    that cannot format its answer.

    Attributes:
        problem_id: id of the problem.
        output: the model's output.
        strict: whether the answer in the requested format is correct.
        flexible: whether the last text that looks like an answer is correct.
        strict_answer: answer that the strict metric extracted, if any.
        flexible_answer: answer that the flexible metric extracted, if any.
        failure: why the problem counts as wrong without being graded, such as a prompt that is too
            long; None if it was graded.
    """

    problem_id: str
    output: str
    strict: bool
    flexible: bool
    strict_answer: str | None = None
    flexible_answer: str | None = None
    failure: str | None = None


class NotGradedError(Exception):
    """An answer that cannot be graded, with the reason; it counts as wrong."""


class BrokenTaskError(UserError):
    """A method of a task that raised an exception or returned a value of the wrong type."""


class Task(ABC):
    """Base class of tasks. Methods that are not abstract have defaults.

    Attributes:
        name: name in configs, results and tables.
        stop: strings at which an output ends.
        max_new_tokens: maximum tokens per answer in `sdjax eval`; a run has its own setting.
    """

    name: str
    stop: tuple[str, ...] = ()
    max_new_tokens: int = 256

    @abstractmethod
    def problems(self, split: str) -> list[Problem]:
        """Return the problems of "development" or "test", always in the same order."""

    @abstractmethod
    def prompt(self, problem: Problem) -> str:
        """Return the text for the model to complete, or the user message to answer."""

    def examples(self, problem: Problem) -> Sequence[Problem]:
        """Return the worked examples before a problem; the same ones in every evaluation."""
        return ()

    def training(self) -> Sequence[Problem]:
        """Return problems with solutions to train on, disjoint from development and test."""
        return ()

    def completion(self, problem: Problem) -> str:
        """Return what a model should write after the prompt of a training problem.

        By default a space and the solution, or the answer without one, as in worked examples.
        """
        return f" {problem.solution or problem.answer}"

    def notes(self) -> Sequence[str]:
        """Return remarks about the problems and examples for readers of the results."""
        return ()

    @abstractmethod
    def extract_strict(self, text: str) -> str | None:
        """Return the answer if the output has the requested format, else None."""

    @abstractmethod
    def extract_flexible(self, text: str) -> str | None:
        """Return the last text that looks like an answer, or None."""

    @abstractmethod
    def grade(self, extracted: str, problem: Problem) -> bool:
        """Return whether an extracted answer is correct; may be called from several threads.

        Raises:
            NotGradedError: the answer cannot be graded.
        """


def call_checked(task: Task, method: str, types: tuple[type, ...], *arguments: Any) -> Any:
    """Call a method of a task and check the type of its result.

    Args:
        task: the task.
        method: name of the method.
        types: allowed types of the result.
        *arguments: arguments of the method.

    Raises:
        BrokenTaskError: the result has another type, or the method raised something other than
            NotGradedError or UserError.
    """
    where = _where(task, method)
    try:
        result = getattr(task, method)(*arguments)
    except (NotGradedError, UserError):
        raise
    except Exception as error:  # user code may raise anything
        line = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise BrokenTaskError(f"{where} raised {line}") from error
    if not isinstance(result, types):
        expected = " or ".join(dict.fromkeys(kind.__name__ for kind in types))
        raise BrokenTaskError(f"{where} returned {type(result).__name__}, not {expected}")
    return result


def read_problems(task: Task, split: str) -> list[Problem]:
    """Return a task's problems of a split.

    Args:
        task: the task.
        split: "development" or "test".

    Raises:
        BrokenTaskError: the task did not return a list of problems.
    """
    return _read_checked(task, "problems", split)


def read_training(task: Task, held_out: Iterable[Problem] = ()) -> list[Problem]:
    """Return a task's training problems.

    Args:
        task: the task.
        held_out: problems whose questions are left out, such as those of development and test.

    Raises:
        BrokenTaskError: the task did not return a list of problems.
    """
    questions = {problem.question for problem in held_out}
    problems = _read_checked(task, "training")
    return [problem for problem in problems if problem.question not in questions]


def _read_checked(task: Task, method: str, *arguments: Any) -> list[Problem]:
    problems = call_checked(task, method, (list, tuple), *arguments)
    for problem in problems:
        if not isinstance(problem, Problem):
            where = _where(task, method)
            raise BrokenTaskError(f"{where} returned {problem!r:.60}, which is not a Problem")
    return list(problems)


def grade_output(task: Task, problem: Problem, output: str) -> Outcome:
    """Extract and grade an answer with both metrics; a missing answer counts as wrong."""
    text = truncate_at_stop(output, task.stop)
    answers: list[str | None] = []
    correct: list[bool] = []
    failure = None
    for method in ("extract_strict", "extract_flexible"):
        answer, is_correct = None, False
        try:
            answer = call_checked(task, method, (str, type(None)), text)
            if answer in answers:
                is_correct = correct[0]
            elif answer is not None:
                is_correct = bool(call_checked(task, "grade", (bool, np.bool_), answer, problem))
        except (NotGradedError, BrokenTaskError) as error:
            failure = str(error)
        answers.append(answer)
        correct.append(is_correct)
    return Outcome(
        problem_id=problem.id,
        output=text,
        strict=correct[0],
        flexible=correct[1],
        strict_answer=answers[0],
        flexible_answer=answers[1],
        failure=failure,
    )


def _where(task: Task, method: str) -> str:
    return f"task {type(task).__module__}:{type(task).__qualname__}: {method}"


def truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """Return the text before the earliest stop string."""
    for stop in stops:
        text = text.split(stop, 1)[0]
    return text
