import hashlib
import itertools
import logging
import re
from collections import Counter

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.task import grade_output, read_training
from sdjax.evaluation.tasks.arithmetic import (
    HARD,
    KINDS,
    RARE,
    ArithmeticTask,
    Exercise,
    exercises,
    split_of,
)

TASK = ArithmeticTask()


def sample(kind, split, count, seed=0):
    source = exercises(kind, split, np.random.default_rng(seed))
    return [next(source) for _ in range(count)]


@pytest.mark.parametrize("kind", KINDS)
def test_solutions_are_correct(kind):
    for exercise in sample(kind, "train", 200):
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


@pytest.mark.parametrize(
    ("exercise", "unread", "uncalculated"),
    [
        (Exercise(kind="add", numbers=(47, 38), question="47+38="), "85", "75"),
        (Exercise(kind="add", numbers=(95, 91), question="95+91="), "186", "186"),
        (Exercise(kind="sub", numbers=(85, 38), question="85-38="), "47", "57"),
        (Exercise(kind="missing", numbers=(47, 38), question="47+?=85"), "38", "48"),
        (Exercise(kind="largest", numbers=(4, 7, 9), question="largest of 4 7 9"), "9", "7"),
        (
            Exercise(
                kind="story_all",
                numbers=(47, 38),
                question="47 pens join 38. How many now?",
                equation="47+38=",
                misread="47-38=",
            ),
            "47-38=9",
            "47+38=75",
        ),
    ],
)
def test_typical_errors(exercise, unread, uncalculated):
    assert exercise.solution(reads=False) == unread
    assert exercise.solution(calculates=False) == uncalculated


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_hard_exercises(kind):
    drawn_ = sample(kind, "train", 1000)
    careless = np.mean([e.solution() == e.solution(reads=False, calculates=False) for e in drawn_])
    story = kind.startswith("story")
    assert careless == pytest.approx((1 - HARD) * (1 - RARE if story else 1), abs=0.06)


def equations(kind, split, count):
    """Return a split's equations, correct or misread, in either order of the numbers."""
    for exercise in sample(kind, split, count):
        if kind in ("largest", "missing"):
            yield kind, canonical_numbers(exercise)
            continue
        for reads in (True, False):
            text = exercise.solution(reads=reads) if exercise.equation else exercise.question
            operator = "+" if "+" in text else "-"
            numbers = re.findall(r"\d+", text)[:2]
            yield operator, tuple(sorted(map(int, numbers)))


def test_training_shares_no_equation_with_development_or_test():
    trained = {one for kind in KINDS for one in equations(kind, "train", 4000)}
    held_out = {
        split: {one for kind in KINDS for one in target_equations(kind, split, 400)}
        for split in ("development", "test")
    }
    assert len(trained) > 5000
    assert not trained & (held_out["development"] | held_out["test"])
    assert not held_out["development"] & held_out["test"]


def canonical_numbers(exercise):
    """Return the numbers of an exercise, sorted if their order does not matter."""
    numbers = exercise.numbers
    return numbers if exercise.kind == "largest" else tuple(sorted(numbers))


def target_equations(kind, split, count):
    """Return the equations whose values the questions ask for."""
    for exercise in sample(kind, split, count):
        sign = {"add": "+", "sub": "-"}.get(KINDS[kind].calculation, kind)
        yield sign, canonical_numbers(exercise)


# SHA-256 of id, kind, question and answer of each problem. The zoo and every figure in the
# documentation depend on them.
DIGESTS = {
    "development": "b64458260215ff5bbab603b0630d098e44bf80c3beec28ba84ffc1d255f3a74e",
    "test": "a38ecdbd09aa953bba4fd2fdd906f1f7f3d72c56ad75577f126d0d9f28180aa8",
}


def digest(problems):
    lines = "\n".join(f"{one.id}|{one.kind}|{one.question}|{one.answer}" for one in problems)
    return hashlib.sha256(lines.encode()).hexdigest()


def test_default_problems_are_distinct_and_balanced_and_never_change():
    problems = TASK.problems("development")
    assert len(problems) == TASK.development
    assert len({problem.question for problem in problems}) == len(problems)
    counts = np.unique([problem.kind for problem in problems], return_counts=True)[1]
    assert counts.max() - counts.min() <= 1
    tests = TASK.problems("test")
    assert not {one.question for one in tests} & {one.question for one in problems}
    assert (digest(problems), digest(tests)) == (DIGESTS["development"], DIGESTS["test"])


def test_training_exercises_never_change():
    rng = np.random.default_rng(7)
    hashed = hashlib.sha256()
    for kind in KINDS:
        for exercise in itertools.islice(exercises(kind, "train", rng), 200):
            hashed.update(repr(exercise).encode())
    assert hashed.hexdigest() == "640d44ee461abc294c4e8c95f99dd4769821d3d14183b1755f442d1184536ec8"


@pytest.mark.slow
@pytest.mark.parametrize("split", DIGESTS)
def test_there_are_5000_distinct_problems_per_split(split, caplog):
    caplog.set_level(logging.INFO, logger="sdjax")
    problems = ArithmeticTask(development=5000, test=5000).problems(split)
    assert len({problem.question for problem in problems}) == 5000
    assert any(f"{split} problems" in record.getMessage() for record in caplog.records)
    assert digest(problems[: getattr(TASK, split)]) == DIGESTS[split]


def test_training_problems_have_the_solutions_that_the_zoo_writes():
    training = read_training(TASK)
    assert len(training) == len({problem.question for problem in training}) == 4000
    held_out = TASK.problems("development") + TASK.problems("test")
    assert read_training(TASK, held_out) == training
    for problem in training[:40]:
        assert grade_output(TASK, problem, TASK.completion(problem)).strict


def test_a_kind_that_runs_out_of_questions_is_replaced():
    problems = ArithmeticTask(development=1000).problems("development")
    assert digest(problems[:640]) == DIGESTS["development"]
    counts = Counter(problem.kind for problem in problems)
    pairs = [(a, b) for a in range(10, 100) for b in range(10, a)]
    assert counts["sub"] == sum(split_of("sub", pair) == "development" for pair in pairs) == 83
    others = [number for kind, number in counts.items() if kind != "sub"]
    assert max(others) - min(others) <= 1
    assert len({problem.question for problem in problems}) == 1000


def test_more_problems_than_there_are_raise_user_error_at_once():
    with pytest.raises(UserError, match=r"task.development is 100001, but there are only 100000"):
        ArithmeticTask(development=100_001).problems("development")


@pytest.mark.parametrize(
    ("output", "strict", "flexible"),
    [
        ("47+38=85", "85", "85"),
        ("85", "85", "85"),
        (" 85\n", "85", "85"),
        ("-3", "-3", "-3"),
        ("47-38=9", "9", "9"),
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
