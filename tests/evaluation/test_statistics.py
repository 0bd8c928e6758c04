import math

import numpy as np
import pytest

from sdjax.evaluation.statistics import (
    accuracy_interval,
    holm_levels,
    independent_difference,
    mean_interval,
    paired_by_key,
    paired_difference,
    paired_p_value,
    percent,
)


def test_wilson_interval_equals_published_values():
    # Newcombe, Stat. Med. 17 (1998), table I, method 3: 81/263, 15/148, 0/20, 1/29
    for right, of, low, high in [
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ]:
        interval = accuracy_interval([True] * right + [False] * (of - right))
        assert interval.mean == right / of
        assert interval.low == pytest.approx(low, abs=5e-5)
        assert interval.high == pytest.approx(high, abs=5e-5)


def test_paired_interval_matches_students_sleep_data():
    # Student, Biometrika 6 (1908): mean 1.58, 95% interval 0.70 to 2.46
    first = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
    second = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
    interval = paired_difference(first, second)
    assert interval.mean == pytest.approx(1.58)
    assert interval.low == pytest.approx(0.7001142, abs=1e-6)
    assert interval.high == pytest.approx(2.4598858, abs=1e-6)
    assert interval.excludes_zero
    by_hand = mean_interval(np.subtract(first, second))
    assert (by_hand.low, by_hand.high) == pytest.approx((interval.low, interval.high))


def test_pairing_narrows_the_interval_and_keeps_coverage():
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        hardness = rng.uniform(size=300)
        a = rng.uniform(size=300) < np.clip(hardness + 0.05, 0, 1)
        b = rng.uniform(size=300) < hardness
        interval = paired_difference(a, b)
        truth = float(np.mean(np.clip(hardness + 0.05, 0, 1) - hardness))
        covered += interval.low <= truth <= interval.high
    assert 0.92 < covered / 400 < 0.98


def test_equal_candidates_have_zero_difference():
    correct = [True, False, True]
    same = paired_difference(correct, correct)
    assert (same.mean, same.low, same.high) == (0, 0, 0)
    assert not same.excludes_zero


def test_single_value_has_infinite_interval():
    interval = paired_difference([1.0], [0.0])
    assert (interval.mean, interval.low, interval.high) == (1.0, -math.inf, math.inf)
    assert not interval.excludes_zero


def test_values_are_paired_by_key():
    a = {"p1": True, "p2": False, "p3": True}
    b = {"p3": True, "p1": False, "p2": False}
    assert paired_by_key(a, b) == paired_difference([1, 0, 1], [0, 0, 1])
    with pytest.raises(ValueError, match="2 keys are in only one mapping, such as p3"):
        paired_by_key(a, {"p1": True, "p2": False, "p4": True})


def test_empty_input_raises_value_error():
    for call in (
        lambda: accuracy_interval([]),
        lambda: mean_interval([]),
        lambda: paired_difference([], []),
        lambda: paired_difference([1.0], [1.0, 2.0]),
    ):
        with pytest.raises(ValueError, match=r"need|expected pairs"):
            call()


def test_holm_levels_by_hand():
    # In the order of the p-values: 0.005 <= 0.05 / 4, 0.011 <= 0.05 / 3, 0.02 <= 0.05 / 2,
    # 0.04 <= 0.05.
    assert holm_levels([0.011, 0.04, 0.005, 0.02]) == [0.05 / 3, 0.05, 0.05 / 4, 0.05 / 2]
    # 0.01 <= 0.05 / 4, but 0.02 > 0.05 / 3: the procedure stops, also for 0.03 and for 0.04, which
    # its own step would have rejected.
    assert holm_levels([0.01, 0.04, 0.03, 0.02]) == [0.05 / 4, 0.05 / 3, 0.05 / 3, 0.05 / 3]
    assert holm_levels([0.2, 0.6]) == [0.05 / 2, 0.05 / 2]
    assert holm_levels([0.2], 0.1) == [0.1]
    assert holm_levels([]) == []


@pytest.mark.parametrize("flips", [3, 12, 40])
def test_p_value_agrees_with_the_interval(flips):
    a, b = np.zeros(200), np.zeros(200)
    a[:flips], b[flips : flips + 2] = 1, 1
    p_value = paired_p_value(a, b)
    for level in (0.5, 0.05, 0.05 / 6, 1e-9):
        assert (p_value < level) == paired_difference(a, b, 1 - level).excludes_zero
    assert paired_p_value(a, a) == paired_p_value([1.0], [0.0]) == 1
    assert paired_p_value(a + 1, a) == 0


def test_independent_difference_equals_published_value():
    # Newcombe, Stat. Med. 17 (1998), table II, method 10, contrast (a): 56/70 - 48/80
    first, second = (
        accuracy_interval([True] * right + [False] * (of - right))
        for right, of in ((56, 70), (48, 80))
    )
    difference = independent_difference(first, second)
    assert difference.mean == pytest.approx(0.2)
    assert (difference.low, difference.high) == pytest.approx((0.0524, 0.3339), abs=5e-5)


def test_number_that_rounds_to_zero_has_no_minus_sign():
    assert percent(-0.0004) == percent(-0.0) == "0.0"
    assert percent(-0.0004, signed=True) == "+0.0"
    assert percent(-0.0006, signed=True) == "-0.1"
