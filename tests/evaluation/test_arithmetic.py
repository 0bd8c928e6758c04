import re

import numpy as np
import pytest

from sdjax.evaluation.arithmetic import (
    KINDS,
    SPLITS,
    ArithmeticTask,
    exercises,
    split_of,
)

TASK = ArithmeticTask()


def drawn(kind, split, count, seed=0):
    source = exercises(kind, split, np.random.default_rng(seed))
    return [next(source) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_solutions_are_right(kind):
    for exercise in drawn(kind, "train", 200):
        first = exercise.numbers[0]
        if kind == "largest":
            assert exercise.answer == str(max(exercise.numbers))
        elif kind == "missing":
            assert exercise.question == f"{first}+?={first + int(exercise.answer)}"
        else:
            equation = exercise.equation or exercise.question
            terms = re.findall(r"[+-]?\d+", equation.removesuffix("="))
            assert sum(map(int, terms)) == int(exercise.answer)
            assert sorted(abs(int(term)) for term in terms) == sorted(exercise.numbers)


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_one_split_are_in_no_other(kind):
    calculation = KINDS[kind].calculation
    seen = {split: {exercise.numbers for exercise in drawn(kind, split, 300)} for split in SPLITS}
    for split, numbers in seen.items():
        assert all(split_of(calculation, tuple_) == split for tuple_ in numbers)
    assert not set.intersection(seen["train"], seen["test"] | seen["development"])
    assert not set.intersection(seen["development"], seen["test"])


def test_problems_are_distinct_balanced_and_always_the_same():
    problems = TASK.problems("development")
    assert len(problems) == TASK.development
    assert len({problem.question for problem in problems}) == len(problems)
    counts = np.unique([problem.kind for problem in problems], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    assert problems == ArithmeticTask().problems("development")
    tests = {problem.question for problem in TASK.problems("test")}
    assert not tests & {problem.question for problem in problems}


@pytest.mark.parametrize(
    ("output", "strict", "flexible"),
    [
        ("47+38=85", "85", "85"),
        ("85", "85", "85"),
        (" 85\n", "85", "85"),
        ("-3", "-3", "-3"),
        ("47+38-90=-5", "-5", "-5"),
        ("47+38=", None, "38"),
        ("the answer is 85", None, "85"),
        ("85 apples", None, "85"),
        ("47+38=85=85", None, "85"),
        ("", None, None),
        ("none", None, None),
    ],
)
def test_extraction(output, strict, flexible):
    assert TASK.extract_strict(output) == strict
    assert TASK.extract_flexible(output) == flexible
