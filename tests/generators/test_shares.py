"""Shares of generators in an iteration."""

from collections import Counter

import numpy as np
import pytest

from sdjax.generators.config import EndpointConfig, GeneratorConfig, SharesConfig, check_generators
from sdjax.generators.shares import Record, assign_samples


def assign(records, count, minimum=0.1, seed=0):
    rng = np.random.default_rng(seed)
    return assign_samples(records, count, minimum=minimum, rng=rng)


def test_first_iteration_is_divided_equally():
    names = assign({"a": Record(), "b": Record(), "c": Record()}, 32)
    assert sorted(Counter(names).values()) == [10, 11, 11]
    assert names == assign({"a": Record(), "b": Record(), "c": Record()}, 32)
    assert names != tuple(sorted(names))  # in random order


def test_share_follows_the_successes_and_keeps_the_minimum():
    records = {"a": Record(samples=100, successes=30), "b": Record(samples=100, successes=2)}
    assert Counter(assign(records, 100)) == {"a": 90, "b": 10}
    # Of equal generators, none is preferred: the mean share over many draws is a half.
    equal = {name: Record(samples=40, successes=4) for name in "ab"}
    shares = [assign(equal, 20, minimum=0, seed=seed).count("a") / 20 for seed in range(200)]
    assert np.mean(shares) == pytest.approx(0.5, abs=0.05)
    # Without a minimum the share is the probability that the generator is the best one.
    records = {"a": Record(samples=10, successes=3), "b": Record(samples=10, successes=1)}
    rng = np.random.default_rng(1)
    better = np.mean(rng.beta(4, 8, 100_000) > rng.beta(2, 10, 100_000))
    assert assign(records, 20_000, minimum=0).count("a") / 20_000 == pytest.approx(better, abs=0.02)


def test_small_iterations_still_try_each_generator():
    records = {"a": Record(samples=100, successes=90), "b": Record(samples=100)}
    assert Counter(assign(records, 4)) == {"a": 3, "b": 1}
    assert len(assign(records, 1)) == 1


def test_generator_with_few_samples_left_gets_no_more():
    records = {"files": Record(remaining=3), "seed": Record()}
    assert Counter(assign(records, 20)) == {"files": 3, "seed": 17}
    records = {"files": Record(samples=3, successes=3, remaining=0), "seed": Record(samples=17)}
    assert Counter(assign(records, 20)) == {"seed": 20}
    assert assign({"files": Record(remaining=2)}, 20) == ("files", "files")
    assert assign({"files": Record(samples=2, remaining=0)}, 20) == ()


def test_names_and_minimum_shares_are_checked():
    reserved = {"seed": "the seed", "grammar": "the random control"}
    check_generators(["gpt", "by-hand_2"], reserved, SharesConfig(), use_own=True)
    for name in ("GPT", "", "../up", "a" * 41):
        with pytest.raises(ValueError, match="must be up to 40 of"):
            check_generators([name], reserved, SharesConfig(), use_own=True)
    for name, whose in reserved.items():
        with pytest.raises(ValueError, match=f"{name} is the name of {whose}; choose another"):
            check_generators([name], reserved, SharesConfig(), use_own=True)
    with pytest.raises(ValueError, match="must not be empty"):
        check_generators([], reserved, SharesConfig(), use_own=False)
    with pytest.raises(ValueError, match="lower it to at most 33"):
        check_generators("ab", reserved, SharesConfig(minimum_percent=40), use_own=True)


def test_generator_is_of_exactly_one_kind():
    for fields in ({}, {"model": "zoo:seed", "programs": "folder"}):
        with pytest.raises(ValueError, match="exactly one of model, endpoint and programs"):
            GeneratorConfig(**fields)
    assert GeneratorConfig(endpoint=EndpointConfig(base_url="http://host/v1", model="m"))
