"""A short run of the fuzzer; see fuzzing.py for long runs."""

import random

import pytest
from fuzzing import JUNK, Judge, fuzz, mutated, random_path, small_signature


@pytest.fixture(scope="module")
def small():
    return small_signature()


def test_mutated_messages_are_verified_or_refused(small):
    judge = fuzz(small, 1_000, seed=11)
    assert judge.outcomes.total() == 1_000
    assert judge.outcomes["admitted"] > 20  # some inputs are valid
    assert judge.outcomes["refused, ir"] > 300
    assert judge.slowest < 20  # seconds


def test_arbitrary_text_is_refused(small):
    judge, draw = Judge(small), random.Random(0)
    for junk in JUNK:
        judge(str(junk))
    for length in (1, 10, 1_000):
        judge("".join(chr(draw.randrange(0x11000)) for _ in range(length)))
    assert set(judge.outcomes) == {"refused, ir"}


def test_mutation_changes_one_node():
    message = {"a": [1, {"b": 2}], "c": "x"}
    draw, before = random.Random(0), repr(message)
    found = {random_path(message, draw) for _ in range(500)}
    assert found == {(), ("a",), ("a", 0), ("a", 1), ("a", 1, "b"), ("c",)}
    found = [mutated(message, [message], draw) for _ in range(200)]
    assert sum(other != message for other in found) > 150
    assert repr(message) == before
