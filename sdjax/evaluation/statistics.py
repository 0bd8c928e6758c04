"""95% confidence intervals of accuracies and of paired differences.

Candidates answer the same problems, so differences are computed problem by problem. The difficulty
of a problem then cancels out, and the interval is much narrower than the intervals of two separate
accuracies.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import stats


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with its confidence interval, which is infinite for a single value.

    Attributes:
        mean: the estimate.
        low: lower end of the interval.
        high: upper end of the interval.
    """

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies entirely above or below zero."""
        return self.low > 0 or self.high < 0

    def in_percent(self, *, signed: bool = False) -> str:
        """Return the interval in percent, such as "82.7 [80.1, 85.0]".

        Args:
            signed: whether to show the sign of positive numbers too, as for a difference.
        """
        mean, low, high = (percent(x, signed=signed) for x in (self.mean, self.low, self.high))
        return f"{mean} [{low}, {high}]"


def aligned_percents(intervals: Sequence[Interval], *, signed: bool = False) -> list[str]:
    """Return intervals in percent, as `Interval.in_percent`, with their numbers below each other.

    Args:
        intervals: the intervals of one column of a table.
        signed: see `Interval.in_percent`.
    """
    rows = [[percent(x, signed=signed) for x in (i.mean, i.low, i.high)] for i in intervals]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    cells = [[x.rjust(w) for x, w in zip(row, widths, strict=True)] for row in rows]
    return [f"{mean} [{low}, {high}]" for mean, low, high in cells]


def percent(fraction: float | None, *, signed: bool = False) -> str:
    """Return a fraction in percent, such as "82.7"; "–" for None.

    All tables and reports show accuracies in this way.

    Args:
        fraction: such as an accuracy.
        signed: whether to show the sign of positive numbers too.
    """
    # "z": a difference that rounds to zero has no minus sign.
    return "–" if fraction is None else f"{100 * fraction:{'+' if signed else ''}z.1f}"


def accuracy_interval(correct: Sequence[bool], confidence: float = 0.95) -> Interval:
    """Return the Wilson score interval of an accuracy (J. Am. Stat. Assoc. 22, 1927).

    Unlike the normal approximation, it stays within [0, 1] and has nonzero width at 0 and 1.

    Args:
        correct: one value per problem.
        confidence: coverage probability of the interval.

    Raises:
        ValueError: there are no values.
    """
    if len(correct) == 0:
        raise ValueError("an accuracy needs at least one problem")
    successes = int(np.sum(np.asarray(correct, dtype=bool)))
    interval = stats.binomtest(successes, len(correct)).proportion_ci(confidence, method="wilson")
    return Interval(
        mean=successes / len(correct), low=float(interval.low), high=float(interval.high)
    )


def independent_difference(a: Interval, b: Interval) -> Interval:
    """Return a - b for accuracies on different problems (Newcombe, Stat. Med. 17, 1998, method 10).

    Args:
        a: the first accuracy with its Wilson interval.
        b: the second accuracy with its Wilson interval, of the same confidence.
    """
    difference = a.mean - b.mean
    return Interval(
        mean=difference,
        low=difference - math.hypot(a.mean - a.low, b.high - b.mean),
        high=difference + math.hypot(a.high - a.mean, b.mean - b.low),
    )


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the t interval of a mean.

    Args:
        values: one value per observation, such as a seed.
        confidence: coverage probability of the interval.

    Raises:
        ValueError: there are no values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("a mean needs at least one value")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf)
    half = stats.t.ppf((1 + confidence) / 2, sample.size - 1) * stats.sem(sample)
    return Interval(mean=mean, low=mean - float(half), high=mean + float(half))


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Return the mean of a - b with the t interval of scipy's `ttest_rel`.

    If all differences are equal, the interval has zero width.

    Args:
        a: one value per problem or seed.
        b: values of the same problems or seeds, in the same order.
        confidence: coverage probability of the interval.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    differences, test = _paired_test(a, b)
    if test is None:
        return mean_interval(differences.tolist(), confidence)
    interval = test.confidence_interval(confidence)
    return Interval(
        mean=float(differences.mean()), low=float(interval.low), high=float(interval.high)
    )


def paired_by_key(
    a: Mapping[str, float], b: Mapping[str, float], confidence: float = 0.95
) -> Interval:
    """Return `paired_difference` of two mappings from problem or seed to value.

    Args:
        a: values by key.
        b: values by the same keys.
        confidence: coverage probability of the interval.

    Raises:
        ValueError: the keys differ.
    """
    if a.keys() != b.keys():
        unpaired = sorted(map(str, a.keys() ^ b.keys()))
        raise ValueError(f"{len(unpaired)} keys are in only one mapping, such as {unpaired[0]}")
    keys = list(a)
    return paired_difference([a[key] for key in keys], [b[key] for key in keys], confidence)


def paired_p_value(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the two-sided p-value of scipy's `ttest_rel` for no difference of the means.

    It is below 1 - confidence if and only if the interval of `paired_difference` excludes zero.

    Args:
        a: one value per problem or seed.
        b: values of the same problems or seeds, in the same order.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    differences, test = _paired_test(a, b)
    if test is None:
        return 1.0 if differences.size == 1 or differences[0] == 0 else 0.0
    return float(test.pvalue)


def _paired_test(a: Sequence[float], b: Sequence[float]) -> tuple[np.ndarray, Any]:
    """Return the differences a - b, and scipy's `ttest_rel`.

    The test is undefined for a single pair, and if all differences are equal.

    Raises:
        ValueError: the lengths differ, or there are no values.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"expected pairs, got {first.size} and {second.size} values")
    differences = first - second
    if first.size == 1 or np.ptp(differences) == 0:
        return differences, None
    with warnings.catch_warnings():
        # scipy warns of lost precision if nearly all differences are equal, which is common here.
        warnings.simplefilter("ignore", RuntimeWarning)
        return differences, stats.ttest_rel(first, second)


def holm_levels(p_values: Sequence[float], level: float = 0.05) -> list[float]:
    """Return the level at which Holm's procedure decides on each hypothesis.

    The procedure (Scand. J. Stat. 6, 1979) takes m hypotheses in the order of their p-values and
    rejects the first one if its p-value is at most level / m, the second one if its is at most
    level / (m - 1), and so on; it stops at the first one that it does not reject, and rejects
    none after it. The probability of rejecting any true hypothesis is at most `level`, however the
    tests depend on each other.

    A hypothesis is rejected if and only if its p-value is at most the returned level. Those after
    the stop have the level of the stop.

    Args:
        p_values: one per hypothesis.
        level: probability of rejecting any true hypothesis.
    """
    levels = [0.0] * len(p_values)
    order = sorted(range(len(p_values)), key=lambda number: p_values[number])
    current, stopped = 0.0, False
    for step, number in enumerate(order):
        if not stopped:
            current = level / (len(p_values) - step)
            stopped = p_values[number] > current
        levels[number] = current
    return levels
