"""Short arithmetic and word problems of several kinds: the task that the zoo is trained for.

Plain kinds need calculating, story kinds reading and calculating: their solution is an equation
and its value. Half of all problems have numbers of three digits, and half of all stories are told
in a rare way, so that ability comes in steps. A problem belongs to one split for good, by a hash
of its kind of calculation and its numbers, so that neither a story nor a plain problem of the test
set, nor one with its numbers, is ever trained on.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Iterator

import numpy as np

from sdjax.evaluation.task import Problem

SPLITS = ("train", "calibration", "development", "test")
# Hundredths of all number tuples that are not for training.
_HELD_OUT = {"calibration": 5, "development": 12, "test": 23}

NAMES = ("Tom", "Ana", "Ben", "Eva", "Sam", "Lea", "Max", "Ida", "Leo", "Mia")
ITEMS = ("apples", "books", "coins", "cards", "eggs", "pens", "nuts", "cups", "stamps", "balls")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exercise:
    """A problem with its worked solution.

    Attributes:
        kind: one of KINDS.
        numbers: what it calculates with.
        question: the text in front of the answer.
        equation: what a story has to be turned into, such as `47+38=`; empty elsewhere.
        answer: the number asked for.
        hard: whether the numbers have three digits, or the story is told in a rare way.
    """

    kind: str
    numbers: tuple[int, ...]
    question: str
    equation: str
    answer: str
    hard: bool

    @property
    def solution(self) -> str:
        """The text behind the question: the equation where there is one, and the answer."""
        return self.equation + self.answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    """What a kind calculates, and how its stories are told: usual ways, and rare ones."""

    calculation: str
    usual: tuple[str, ...] = ()
    rare: tuple[str, ...] = ()


KINDS: dict[str, _Kind] = {
    "add": _Kind(calculation="add"),
    "sub": _Kind(calculation="sub"),
    "chain": _Kind(calculation="chain"),
    "story_add": _Kind(
        calculation="add",
        usual=(
            "{n} has {a} {i}. {m} brings {b} more.{x} How many {i} in all?",
            "{n} and {m} have {a} and {b} {i}.{x} How many together?",
            "There are {a} {i} here and {b} there.{x} How many in all?",
        ),
        rare=(
            "{m} gives {n} {b} {i}.{x} Before, {n} had {a}. How many now?",
            "{x}{b} {i} are added to {a}. How many now?",
            "{n} sold {b} {i} and has {a} left.{x} How many before?",
        ),
    ),
    "story_sub": _Kind(
        calculation="sub",
        usual=(
            "{n} has {a} {i} and gives {m} {b}.{x} How many are left?",
            "Of {a} {i}, {b} are sold.{x} How many remain?",
            "There were {a} {i}. {n} takes {b}.{x} How many are left?",
        ),
        rare=(
            "{m} takes {b} {i} from {n}.{x} Before, {n} had {a}. How many now?",
            "{x}{n} loses {b} of {a} {i}. How many are left?",
            "{n} has {b} {i}, {m} has {a}.{x} How many more has {m}?",
        ),
    ),
    "story_chain": _Kind(
        calculation="chain",
        usual=(
            "{n} has {a} {i}, gets {b} and loses {c}.{x} How many now?",
            "{n} and {m} have {a} and {b} {i}.{x} They sell {c}. How many remain?",
        ),
        rare=(
            "{x}{m} took {c} {i} from {n}, who had {a} and then {b} more. How many now?",
            "They sell {c} {i} and had {a} and {b}.{x} How many remain?",
        ),
    ),
    "largest": _Kind(calculation="largest"),
    "missing": _Kind(calculation="missing"),
}


def _numbers(calculation: str, large: bool, rng: np.random.Generator) -> tuple[int, ...]:
    """Numbers of two digits, or of three up to 399; no result is negative."""
    low, high = (100, 400) if large else (10, 100)
    a, b, c = (int(number) for number in rng.integers(low, high, 3))
    if calculation == "sub":
        return max(a, b), min(a, b)
    return (a, b, c) if calculation in ("chain", "largest") else (a, b)


def split_of(calculation: str, numbers: tuple[int, ...]) -> str:
    """The split that a calculation belongs to; the same on every machine."""
    hundredth = zlib.crc32(f"{calculation} {numbers}".encode()) % 100
    for split, bound in _HELD_OUT.items():
        if hundredth < bound:
            return split
    return "train"


def exercises(kind: str, split: str, rng: np.random.Generator) -> Iterator[Exercise]:
    """Endless exercises of one kind and split: half with large numbers, half told rarely."""
    while True:
        calculation = KINDS[kind].calculation
        numbers = _numbers(calculation, bool(rng.random() < 0.5), rng)
        fits = calculation != "chain" or numbers[0] + numbers[1] >= numbers[2]
        if fits and split_of(calculation, numbers) == split:
            yield _exercise(kind, numbers, bool(rng.random() < 0.5), rng)


def _exercise(
    kind: str, numbers: tuple[int, ...], rare: bool, rng: np.random.Generator
) -> Exercise:
    a, b, *rest = numbers
    calculation = KINDS[kind].calculation
    if calculation == "largest":
        question, equation, answer = "largest of {} {} {}".format(*numbers), "", max(numbers)
    elif calculation == "missing":
        question, equation, answer = f"{a}+?={a + b}", "", b
    else:
        expression = {"add": "{}+{}", "sub": "{}-{}", "chain": "{}+{}-{}"}[calculation]
        question, equation = expression.format(*numbers) + "=", ""
        answer = {"add": a + b, "sub": a - b, "chain": a + b - sum(rest)}[calculation]
    stories = KINDS[kind].rare if rare else KINDS[kind].usual
    if stories:
        equation = question
        question = _story(stories[rng.integers(len(stories))], numbers, rng)
    return Exercise(
        kind=kind,
        numbers=numbers,
        question=question,
        equation=equation,
        answer=str(answer),
        hard=max(numbers) >= 100 or (rare and bool(stories)),
    )


def _story(template: str, numbers: tuple[int, ...], rng: np.random.Generator) -> str:
    first, second, third = rng.choice(len(NAMES), 3, replace=False)
    aside = ""
    if rng.random() < 0.4:
        # A number that has nothing to do with the question.
        aside = f" {NAMES[third]} is {rng.integers(10, 100)} years old."
    story = template.format(
        n=NAMES[first],
        m=NAMES[second],
        i=ITEMS[rng.integers(len(ITEMS))],
        x=aside,
        **dict(zip("abc", numbers, strict=False)),
    )
    # A story that opens with the aside, or with none, still starts with a word.
    story = story.strip()
    return re.sub(r"\.(?=[A-Z])", ". ", story)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArithmeticTask:
    """Equally many problems of every kind.

    Attributes:
        name: how a configuration and the store call it.
        development: number of development problems.
        test: number of test problems.
        seed: of the drawing; the splits are disjoint whatever it is.
    """

    name: str = "arithmetic"
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
        match = re.fullmatch(r"\s*(?:[\d+\-]+=)?(-?\d+)\s*", text)
        return match[1] if match else None

    def extract_flexible(self, text: str) -> str | None:
        """The last number anywhere in the answer."""
        numbers = re.findall(r"-?\d+", text)
        return numbers[-1] if numbers else None

    def grade(self, extracted: str, problem: Problem) -> bool:
        return int(extracted) == int(problem.answer)


def prompt_of(question: str) -> str:
    """The text in front of a solution, the same in training and in tests."""
    return f"{question}\nA:"
