"""Short arithmetic and word problems of several kinds: the task that the zoo is trained for.

Plain kinds need calculating, story kinds reading and calculating: their solution is an equation
and its value. A problem belongs to one split for good, by a hash of its kind of calculation and
its numbers, so that neither a story nor a plain problem of the test set, nor one with its
numbers, is ever trained on.
"""

from __future__ import annotations

import dataclasses
import re
import zlib
from collections.abc import Callable, Iterator

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
    """

    kind: str
    numbers: tuple[int, ...]
    question: str
    equation: str
    answer: str

    @property
    def solution(self) -> str:
        """The text behind the question: the equation where there is one, and the answer."""
        return self.equation + self.answer


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Kind:
    calculation: str
    draw: Callable[[np.random.Generator], tuple[int, ...]]
    stories: tuple[str, ...] = ()


def _two(rng: np.random.Generator) -> tuple[int, ...]:
    a, b = (int(x) for x in rng.integers(10, 100, 2))
    return a, b


def _descending(rng: np.random.Generator) -> tuple[int, ...]:
    a, b = sorted((int(x) for x in rng.integers(10, 100, 2)), reverse=True)
    return a, b


def _chain(rng: np.random.Generator) -> tuple[int, ...]:
    a, b = _two(rng)
    return a, b, int(rng.integers(10, min(100, a + b)))


def _three(rng: np.random.Generator) -> tuple[int, ...]:
    a, b, c = (int(x) for x in rng.choice(np.arange(10, 100), 3, replace=False))
    return a, b, c


KINDS: dict[str, _Kind] = {
    "add": _Kind(calculation="add", draw=_two),
    "sub": _Kind(calculation="sub", draw=_descending),
    "chain": _Kind(calculation="chain", draw=_chain),
    "story_add": _Kind(
        calculation="add",
        draw=_two,
        stories=(
            "{n} has {a} {i}. {m} brings {b} more.{x} How many {i} in all?",
            "{x}{n} buys {a} {i} and then {b} more. How many {i} in all?",
            "{n} and {m} have {a} and {b} {i}.{x} How many together?",
            "{m} gives {n} {b} {i}.{x} Before, {n} had {a}. How many now?",
            "There are {a} {i} here and {b} there.{x} How many in all?",
        ),
    ),
    "story_sub": _Kind(
        calculation="sub",
        draw=_descending,
        stories=(
            "{n} has {a} {i} and gives {m} {b}.{x} How many are left?",
            "{x}{n} loses {b} of {a} {i}. How many are left?",
            "{n} has {a} {i}, {m} has {b}.{x} How many more has {n}?",
            "{m} takes {b} {i} from {n}.{x} Before, {n} had {a}. How many now?",
            "Of {a} {i}, {b} are sold.{x} How many remain?",
        ),
    ),
    "story_chain": _Kind(
        calculation="chain",
        draw=_chain,
        stories=(
            "{n} has {a} {i}, gets {b} and loses {c}.{x} How many now?",
            "{n} had {a} {i}. {m} brought {b}.{x} Then {c} were sold. How many now?",
            "{x}{m} took {c} {i} from {n}, who had {a} and then {b} more. How many now?",
            "{n} and {m} have {a} and {b} {i}.{x} They sell {c}. How many remain?",
        ),
    ),
    "largest": _Kind(calculation="largest", draw=_three),
    "missing": _Kind(calculation="missing", draw=_two),
}


def split_of(calculation: str, numbers: tuple[int, ...]) -> str:
    """The split that a calculation belongs to; the same on every machine."""
    hundredth = zlib.crc32(f"{calculation} {numbers}".encode()) % 100
    for split, bound in _HELD_OUT.items():
        if hundredth < bound:
            return split
    return "train"


def exercises(kind: str, split: str, rng: np.random.Generator) -> Iterator[Exercise]:
    """Endless exercises of one kind and split, drawn by `rng`."""
    while True:
        numbers = KINDS[kind].draw(rng)
        if split_of(KINDS[kind].calculation, numbers) == split:
            yield _exercise(kind, numbers, rng)


def _exercise(kind: str, numbers: tuple[int, ...], rng: np.random.Generator) -> Exercise:
    a, b, *rest = numbers
    calculation = KINDS[kind].calculation
    if calculation == "largest":
        question, equation, answer = "largest of {} {} {}".format(*numbers), "", max(numbers)
    elif calculation == "missing":
        question, equation, answer = f"{a}+?={a + b}", "", b
    else:
        expression = {"add": "{}+{}", "sub": "{}-{}", "chain": "{}+{}-{}"}[calculation]
        question, equation = expression.format(*numbers) + "=", ""
        answer = {"add": a + b, "sub": a - b, "chain": a + b - (rest or [0])[0]}[calculation]
    if stories := KINDS[kind].stories:
        equation = question
        question = _story(stories[rng.integers(len(stories))], numbers, rng)
    return Exercise(
        kind=kind, numbers=numbers, question=question, equation=equation, answer=str(answer)
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
