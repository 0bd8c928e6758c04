"""Short arithmetic and word problems of several kinds: the task that the zoo is trained for.

Plain kinds need calculating; stories need reading and calculating, since their solution is an
equation and its value. Either can be hard: a calculation that carries or borrows, a story that is
told in a rare way. A typical mistake belongs to each (the carry forgotten, the operation
mistaken), so that one can say what somebody writes who reads well and calculates badly.

A problem belongs to one split for good, by a hash of its calculation and its numbers. Development
and test problems keep away from training further than that: of an equation that is asked for there,
neither itself nor its other order is trained on, be it as an exercise or as a story misread. Of
`missing` that holds for the exercise, not for the sum behind it, which may be trained on as an
addition; the inverse of a subtraction may be too, and `largest` keeps the same three numbers in
another order apart only by chance.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterator
from decimal import Decimal

import numpy as np

from sdjax.evaluation.task import Problem, Task

SPLITS = ("train", "calibration", "development", "test")
# Hundredths of all number tuples: below the first bound for calibration, above the second for
# training, and between them for development or test (a third of them, or the rest).
_CALIBRATION, _TRAIN = 5, 40
# Shares of the problems with hard numbers, and of the stories that are told in a rare way.
HARD, RARE = 0.42, 0.32

NAMES = ("Tom", "Ana", "Ben", "Eva", "Sam", "Lea", "Max", "Ida", "Leo", "Mia")
ITEMS = ("apples", "books", "coins", "cards", "eggs", "pens", "nuts", "cups", "stamps", "balls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a kind calculates, and how its stories are told: usual ways, and rare ones."""

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
    """A problem and how it is solved, well or badly.

    Attributes:
        kind: one of KINDS.
        numbers: what it calculates with.
        question: the text in front of the answer.
        equation: what a story has to be turned into, such as `47+38=`; empty elsewhere.
        misread: the equation of one who mistakes the operation; the right one where a story is
            told in a usual way.
    """

    kind: str
    numbers: tuple[int, ...]
    question: str
    equation: str = ""
    misread: str = ""

    @property
    def answer(self) -> str:
        """The number asked for."""
        return self.solution().removeprefix(self.equation)

    def solution(self, *, reads: bool = True, calculates: bool = True, attends: bool = True) -> str:
        """The text behind the question, by one who can read rare tellings and carry, or cannot.

        One who does not even attend to the question says its first number.
        """
        if not attends:
            return str(self.numbers[0])
        equation = self.equation if reads else self.misread
        calculation, numbers = KINDS[self.kind].calculation, self.numbers
        if equation:
            calculation, numbers = _parse(equation)
        value = _value if calculates else _slip
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


def _slip(calculation: str, numbers: tuple[int, ...]) -> int:
    """What comes out where carries and borrows are forgotten, and the last number overlooked."""
    value = _value(calculation, numbers)
    if not _is_hard(calculation, numbers):
        return value
    return {"add": value - 10, "sub": value + 10, "missing": value + 10}.get(
        calculation, max(numbers[:-1])
    )


def _is_hard(calculation: str, numbers: tuple[int, ...]) -> bool:
    """Whether the ones carry or borrow, or the largest number stands last."""
    a, b, *_ = (number % 10 for number in numbers)
    match calculation:
        case "add" | "missing":
            return a + b >= 10  # taking a from a + b borrows exactly where a + b carries
        case "sub":
            return a < b
    return numbers[-1] > max(numbers[:-1])


def _numbers(calculation: str, hard: bool, rng: np.random.Generator) -> tuple[int, ...]:
    """Distinct numbers of two digits, as hard as asked for; no result is negative."""
    while True:
        drawn = rng.choice(np.arange(10, 100), 3 if calculation == "largest" else 2, replace=False)
        numbers = tuple(int(number) for number in drawn)
        if calculation == "sub":
            numbers = tuple(sorted(numbers, reverse=True))
        if _is_hard(calculation, numbers) == hard:
            return numbers


def split_of(calculation: str, numbers: tuple[int, ...]) -> str | None:
    """The split that a calculation belongs to, the same on every machine; None where to none.

    That is where it is not trained on itself but too close to what is.
    """
    hundredth = _hundredth(calculation, numbers)
    if hundredth >= _TRAIN:
        return "train"
    if hundredth < _CALIBRATION:
        return "calibration"
    if any(_hundredth(*relative) >= _TRAIN for relative in _relatives(calculation, numbers)):
        return None
    # Relatives share a split, so that development tells nothing of the test either.
    family = "pair" if calculation in ("add", "sub") else calculation
    third = _hundredth(f"{family}, held out", tuple(sorted(numbers))) < 33
    return "development" if third else "test"


def _hundredth(calculation: str, numbers: tuple[int, ...]) -> int:
    return zlib.crc32(f"{calculation} {numbers}".encode()) % 100


def _relatives(calculation: str, numbers: tuple[int, ...]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Calculations whose exercises, well or badly solved, show the equation or its other order."""
    if calculation == "largest":
        return
    for order in (numbers, numbers[::-1]):
        if calculation == "missing":
            yield calculation, order
        else:
            yield "add", order
            yield "sub", tuple(sorted(order, reverse=True))


def exercises(kind: str, split: str, rng: np.random.Generator) -> Iterator[Exercise]:
    """Endless exercises of one kind and split, `HARD` and `RARE` of them so."""
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
    # Now and then a number that has nothing to do with the question.
    aside = f" {NAMES[third]} is {rng.integers(10, 100)}." if rng.random() < 0.25 else ""
    return template.format(
        n=NAMES[first],
        m=NAMES[second],
        i=ITEMS[rng.integers(len(ITEMS))],
        x=aside,
        **dict(zip("ab", numbers, strict=False)),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticTask(Task):
    """Equally many problems of every kind.

    Attributes:
        name: how a configuration and the store call it.
        development: number of development problems.
        test: number of test problems.
        seed: of the drawing; the splits are disjoint whatever it is.
    """

    name: str = "arithmetic"
    max_new_tokens: int = 64
    development: int = 640
    test: int = 1200
    seed: int = 0

    def problems(self, split: str) -> list[Problem]:
        """The distinct problems of a split, the kinds taking turns."""
        count = {"development": self.development, "test": self.test}.get(split, 400)
        sources = []
        for index, kind in enumerate(KINDS):
            rng = np.random.default_rng([self.seed, SPLITS.index(split), index])
            sources.append(exercises(kind, split, rng))
        seen: set[str] = set()
        problems: list[Problem] = []
        while len(problems) < count:
            exercise = next(sources[len(problems) % len(sources)])
            if exercise.question in seen:
                continue
            seen.add(exercise.question)
            problems.append(
                Problem(
                    id=f"{split}-{len(problems)}",
                    kind=exercise.kind,
                    question=exercise.question,
                    answer=exercise.answer,
                )
            )
        return problems

    def prompt(self, problem: Problem) -> str:
        return prompt_of(problem.question)

    def extract_strict(self, text: str) -> str | None:
        """The number that the whole answer is, behind an equation or alone."""
        match = re.fullmatch(r"\s*(?:\d+[+-]\d+=)?(-?\d+)\s*", text)
        return match[1] if match else None

    def extract_flexible(self, text: str) -> str | None:
        """The last number anywhere in the answer."""
        numbers = re.findall(r"-?\d+", text)
        return numbers[-1] if numbers else None

    def grade(self, extracted: str, problem: Problem) -> bool:
        # Not by `int`, which refuses very long texts.
        return Decimal(extracted) == Decimal(problem.answer)


def prompt_of(question: str) -> str:
    """The text in front of a solution, the same in training and in tests.

    An open equation is its own prompt, so that it looks as it does in the solution of a story:
    what is learned of the one serves the other.
    """
    return question if question.endswith("=") else f"{question}\nA:"
