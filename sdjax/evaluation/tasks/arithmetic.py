"""Short arithmetic and word problems of several kinds: the task that the zoo is trained for.

Plain kinds require calculation. Stories require reading and calculation, because their solution is
an equation and its value. Each can be hard: a calculation with a carry or borrow, or a story with
rare wording. Each difficulty has a typical error (a forgotten carry, the wrong operation), so the
solutions of a model that reads well but calculates badly are well defined.

Each problem is assigned to one split by a hash of its calculation and numbers. Development and test
problems are also kept apart from similar training problems: an equation that they ask for never
appears in training, in either operand order, whether as an exercise or as a misread story. There
are three exceptions: the sum underlying a `missing` exercise may be trained as an addition, the
inverse of a subtraction may be trained, and `largest` may share its three numbers with a training
problem in another order.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
import zlib
from collections.abc import Iterator, Mapping
from decimal import Decimal

import numpy as np

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.evaluation.task import Problem, Task

SPLITS = ("train", "calibration", "development", "test")
# Number tuples are hashed to buckets 0 to 99. Buckets below the first bound are for calibration,
# those from the second bound on for training. A third of the rest is for development, the others
# are for testing.
_CALIBRATION, _TRAIN = 5, 40
# Number of training problems.
_TRAINING = 4000
# Fractions of problems with hard numbers, and of stories with rare wording.
HARD, RARE = 0.42, 0.32
# Maximum number of problems of a split. Up to here no kind with many questions runs out of them.
MAX_PROBLEMS = 100_000
# From this number of problems on, sampling takes several seconds, so its progress is shown.
_MANY_PROBLEMS = 5_000

NAMES = ("Tom", "Ana", "Ben", "Eva", "Sam", "Lea", "Max", "Ida", "Leo", "Mia")
ITEMS = ("apples", "books", "coins", "cards", "eggs", "pens", "nuts", "cups", "stamps", "balls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """A kind of problem: its calculation, and story templates with common and rare wording."""

    calculation: str
    usual: tuple[str, ...] = ()
    rare: tuple[str, ...] = ()


KINDS: dict[str, _Kind] = {
    "add": _Kind(calculation="add"),
    "sub": _Kind(calculation="sub"),
    "story_all": _Kind(
        calculation="add",
        usual=(
            "{n} has {a} {i}. {m} brings {b} more.{x} How many in all?",
            "{n} and {m} have {a} and {b} {i}.{x} How many in all?",
        ),
        rare=(
            "{m} gives {n} {b} {i}.{x} {n} had {a}. How many now?",
            "{b} {i} join {a}.{x} How many now?",
        ),
    ),
    "story_left": _Kind(
        calculation="sub",
        usual=(
            "{n} has {a} {i} and gives {m} {b}.{x} How many are left?",
            "Of {a} {i}, {n} sells {b}.{x} How many are left?",
        ),
        rare=(
            "{m} takes {b} {i} from {n}.{x} {n} had {a}. How many now?",
            "{n} loses {b} of {a} {i}.{x} How many now?",
        ),
    ),
    "story_before": _Kind(
        calculation="add",
        usual=(
            "{n} sells {b} {i} and has {a} left.{x} How many before?",
            "{n} gives {m} {b} {i} and keeps {a}.{x} How many before?",
        ),
        rare=(
            "After {n} ate {b} {i}, {a} remain.{x} How many at first?",
            "{a} {i} remain when {b} are gone.{x} How many at first?",
        ),
    ),
    "story_more": _Kind(
        calculation="sub",
        usual=(
            "{n} has {a} {i} and {m} has {b}.{x} How many more has {n}?",
            "There are {a} {i} and {b} bags.{x} How many more {i}?",
        ),
        rare=(
            "{n} wants {a} {i} and has {b}.{x} How many to go?",
            "{m} has {b} {i}, {n} has {a}.{x} How far behind is {m}?",
        ),
    ),
    "largest": _Kind(calculation="largest"),
    "missing": _Kind(calculation="missing"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exercise:
    """A problem with its correct and its typical wrong solutions.

    Attributes:
        kind: one of KINDS.
        numbers: operands of the calculation.
        question: the text before the answer.
        equation: equation of a story, such as `47+38=`; empty for other kinds.
        misread: equation with the wrong operation if the wording is rare; otherwise correct.
    """

    kind: str
    numbers: tuple[int, ...]
    question: str
    equation: str = ""
    misread: str = ""

    @property
    def answer(self) -> str:
        """Correct answer."""
        return self.solution().removeprefix(self.equation)

    def solution(self, *, reads: bool = True, calculates: bool = True, attends: bool = True) -> str:
        """Return the text after the question, correct or with typical errors.

        Args:
            reads: whether stories with rare wording are understood.
            calculates: whether carries and borrows are correct.
            attends: whether the question is read at all; if not, the answer is the first number.
        """
        if not attends:
            return str(self.numbers[0])
        equation = self.equation if reads else self.misread
        calculation, numbers = KINDS[self.kind].calculation, self.numbers
        if equation:
            calculation, numbers = _parse(equation)
        value = _value if calculates else _wrong_value
        return f"{equation}{value(calculation, numbers)}"


def _parse(equation: str) -> tuple[str, tuple[int, int]]:
    a, operator, b = re.split(r"([+-])", equation.rstrip("="))
    return ("add" if operator == "+" else "sub"), (int(a), int(b))


def _value(calculation: str, numbers: tuple[int, ...]) -> int:
    match calculation:
        case "add":
            return numbers[0] + numbers[1]
        case "sub":
            return numbers[0] - numbers[1]
        case "missing":
            return numbers[1]
    return max(numbers)


def _wrong_value(calculation: str, numbers: tuple[int, ...]) -> int:
    """Return the value that ignores carries and borrows, or the largest number but the last."""
    value = _value(calculation, numbers)
    if not _is_hard(calculation, numbers):
        return value
    return {"add": value - 10, "sub": value + 10, "missing": value + 10}.get(
        calculation, max(numbers[:-1])
    )


def _is_hard(calculation: str, numbers: tuple[int, ...]) -> bool:
    """Return whether the ones digits carry or borrow, or the largest number comes last."""
    a, b, *_ = (number % 10 for number in numbers)
    match calculation:
        case "add" | "missing":
            return a + b >= 10  # a + b - a borrows exactly if a + b carries
        case "sub":
            return a < b
    return numbers[-1] > max(numbers[:-1])


def _numbers(calculation: str, hard: bool, rng: np.random.Generator) -> tuple[int, ...]:
    """Sample distinct two-digit numbers of the given difficulty; no result is negative."""
    while True:
        sample = rng.choice(np.arange(10, 100), 3 if calculation == "largest" else 2, replace=False)
        numbers = tuple(int(number) for number in sample)
        if calculation == "sub":
            numbers = tuple(sorted(numbers, reverse=True))
        if _is_hard(calculation, numbers) == hard:
            return numbers


def split_of(calculation: str, numbers: tuple[int, ...]) -> str | None:
    """Return the split of a calculation, or None if it is too similar to a training problem.

    The result is the same on every machine.
    """
    bucket = _bucket(calculation, numbers)
    if bucket >= _TRAIN:
        return "train"
    if bucket < _CALIBRATION:
        return "calibration"
    if any(_bucket(*other) >= _TRAIN for other in _similar(calculation, numbers)):
        return None
    # Similar calculations share a split, so development problems reveal nothing about the test.
    family = "pair" if calculation in ("add", "sub") else calculation
    is_development = _bucket(f"{family}, held out", tuple(sorted(numbers))) < 33
    return "development" if is_development else "test"


def _bucket(calculation: str, numbers: tuple[int, ...]) -> int:
    return zlib.crc32(f"{calculation} {numbers}".encode()) % 100


def _similar(calculation: str, numbers: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield calculations whose solutions may show the equation, or its reversed order."""
    if calculation == "largest":
        return
    for order in (numbers, numbers[::-1]):
        if calculation == "missing":
            yield calculation, order
        else:
            yield "add", order
            yield "sub", tuple(sorted(order, reverse=True))


def exercises(kind: str, split: str, rng: np.random.Generator) -> Iterator[Exercise]:
    """Yield exercises of one kind and split forever, in the proportions of HARD and RARE."""
    calculation = KINDS[kind].calculation
    while True:
        numbers = _numbers(calculation, bool(rng.random() < HARD), rng)
        if split_of(calculation, numbers) == split:
            yield _exercise(kind, numbers, bool(rng.random() < RARE), rng)


def _exercise(
    kind: str, numbers: tuple[int, ...], rare: bool, rng: np.random.Generator
) -> Exercise:
    a, b, *_ = numbers
    calculation = KINDS[kind].calculation
    stories = KINDS[kind].rare if rare else KINDS[kind].usual
    if not stories:
        question = {
            "add": f"{a}+{b}=",
            "sub": f"{a}-{b}=",
            "largest": f"largest of {' '.join(map(str, numbers))}",
            "missing": f"{a}+?={a + b}",
        }[calculation]
        return Exercise(kind=kind, numbers=numbers, question=question)
    summed, subtracted = f"{a}+{b}=", f"{max(a, b)}-{min(a, b)}="
    right, wrong = (summed, subtracted) if calculation == "add" else (subtracted, summed)
    return Exercise(
        kind=kind,
        numbers=numbers,
        question=_story(stories[rng.integers(len(stories))], numbers, rng),
        equation=right,
        misread=wrong if rare else right,
    )


def _story(template: str, numbers: tuple[int, ...], rng: np.random.Generator) -> str:
    first, second, third = rng.choice(len(NAMES), 3, replace=False)
    # Some stories mention a number that is irrelevant to the question.
    distractor = f" {NAMES[third]} is {rng.integers(10, 100)}." if rng.random() < 0.25 else ""
    return template.format(
        n=NAMES[first],
        m=NAMES[second],
        i=ITEMS[rng.integers(len(ITEMS))],
        x=distractor,
        **dict(zip("ab", numbers, strict=False)),
    )


def _distinct_exercises(
    sources: Mapping[str, Iterator[Exercise]], split: str
) -> Iterator[Exercise]:
    """Yield exercises that ask different questions; the kinds take turns.

    A kind drops out when all of its questions have been asked. The questions of stories are
    practically unlimited, and those of `largest` suffice for MAX_PROBLEMS problems.

    Args:
        sources: for each kind, its exercises as `exercises` yields them.
        split: the split of the exercises.
    """
    questions: dict[str, set[str]] = {kind: set() for kind in sources}
    for kind in itertools.cycle(sources):
        asked = questions[kind]
        if len(asked) == _num_questions(kind, split):
            continue
        exercise = next(one for one in sources[kind] if one.question not in asked)
        asked.add(exercise.question)
        yield exercise


@functools.cache
def _num_questions(kind: str, split: str) -> int | None:
    """Return the number of questions of a kind about two numbers; None for the other kinds."""
    calculation = KINDS[kind].calculation
    if KINDS[kind].usual or calculation == "largest":
        return None
    return sum(
        split_of(calculation, numbers) == split
        for numbers in itertools.permutations(range(10, 100), 2)
        if calculation != "sub" or numbers[0] > numbers[1]
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticTask(Task):
    """Arithmetic task with equally many problems of every kind, as long as there are any.

    With more than 665 development or 1,465 test problems, a kind without stories has no
    new question when its turn comes; the other kinds replace it. Their stories then use the same
    numbers several times, in other words.

    Attributes:
        name: name in configs and results.
        max_new_tokens: maximum tokens per answer.
        development: number of development problems, at most MAX_PROBLEMS.
        test: number of test problems, at most MAX_PROBLEMS.
        seed: seed of the random generator; the splits are disjoint for every seed.
    """

    name: str = "arithmetic"
    max_new_tokens: int = 64
    development: int = 640
    test: int = 1200
    seed: int = 0

    def problems(self, split: str) -> list[Problem]:
        """Return distinct problems of a split, cycling through the kinds.

        Raises:
            UserError: there are fewer problems than requested.
        """
        count = {"development": self.development, "test": self.test}.get(split, 400)
        if count > MAX_PROBLEMS:
            raise UserError(
                f"task {self.name}: task.{split} is {count}, but there are only {MAX_PROBLEMS} "
                f"{split} problems; lower it"
            )
        return [
            Problem(
                id=f"{split}-{number}",
                kind=exercise.kind,
                question=exercise.question,
                answer=exercise.answer,
            )
            for number, exercise in enumerate(self._reported_exercises(split, count))
        ]

    def training(self) -> list[Problem]:
        """Return exercises of the training split, of which the zoo's models have seen others."""
        return [
            Problem(
                id=f"train-{number}",
                kind=exercise.kind,
                question=exercise.question,
                answer=exercise.answer,
                solution=exercise.solution(),
            )
            for number, exercise in enumerate(self._exercises("train", _TRAINING))
        ]

    def completion(self, problem: Problem) -> str:
        """Return the solution as the zoo's models write it, without a space before it."""
        return problem.solution or problem.answer

    def _exercises(self, split: str, count: int) -> Iterator[Exercise]:
        """Yield distinct exercises of a split, cycling through the kinds."""
        sources = {
            kind: exercises(
                kind, split, np.random.default_rng([self.seed, SPLITS.index(split), index])
            )
            for index, kind in enumerate(KINDS)
        }
        return itertools.islice(_distinct_exercises(sources, split), count)

    def _reported_exercises(self, split: str, count: int) -> Iterator[Exercise]:
        """Yield what `_exercises` yields, with progress if there are many."""
        if count < _MANY_PROBLEMS:
            yield from self._exercises(split, count)
            return
        with progress_bar(f"{split} problems", count) as advance:
            for exercise in self._exercises(split, count):
                yield exercise
                advance()

    def prompt(self, problem: Problem) -> str:
        """Return the prompt of a problem."""
        return prompt_of(problem.question)

    def extract_strict(self, text: str) -> str | None:
        """Return the number if the output is a number, optionally after an equation."""
        match = re.fullmatch(r"\s*(?:\d+[+-]\d+=)?(-?\d+)\s*", text)
        return match[1] if match else None

    def extract_flexible(self, text: str) -> str | None:
        """Return the last number in the output."""
        numbers = re.findall(r"-?\d+", text)
        return numbers[-1] if numbers else None

    def grade(self, extracted: str, problem: Problem) -> bool:
        """Return whether the numbers are equal."""
        # `int` rejects very long strings.
        return Decimal(extracted) == Decimal(problem.answer)


def prompt_of(question: str) -> str:
    """Return the text before a solution, the same in training and in evaluation.

    An open equation is its own prompt. It then looks the same as in the solution of a story, so
    training on one helps the other.
    """
    return question if question.endswith("=") else f"{question}\nA:"
