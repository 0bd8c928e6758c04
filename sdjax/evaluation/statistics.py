"""How sure the numbers are: 95 % intervals of accuracies and of paired differences.

Candidates answer the same problems, so their difference is taken problem by problem: what makes a
problem hard for both drops out, and the interval is far narrower than two accuracies' would be.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True, kw_only=True)
class Interval:
    """A mean with the ends of its confidence interval; infinite where one value is too few."""

    mean: float
    low: float
    high: float

    @property
    def excludes_zero(self) -> bool:
        return self.low > 0 or self.high < 0


def accuracy_interval(correct: Sequence[bool], confidence: float = 0.95) -> Interval:
    """Wilson's score interval of an accuracy (J. Am. Stat. Assoc. 22, 1927).

    It stays within [0, 1] and has a width at 0 and at 1, unlike the textbook's normal interval.
    Raises ValueError on no problems.
    """
    if len(correct) == 0:
        raise ValueError("an accuracy needs at least one problem")
    right = int(np.sum(np.asarray(correct, dtype=bool)))
    ends = stats.binomtest(right, len(correct)).proportion_ci(confidence, method="wilson")
    return Interval(mean=right / len(correct), low=float(ends.low), high=float(ends.high))


def mean_interval(values: Sequence[float], confidence: float = 0.95) -> Interval:
    """The t interval of a mean, as over seeds. Raises ValueError on no values."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size == 0:
        raise ValueError("a mean needs at least one value")
    mean = float(sample.mean())
    if sample.size == 1:
        return Interval(mean=mean, low=-math.inf, high=math.inf)
    half = stats.t.ppf((1 + confidence) / 2, sample.size - 1) * stats.sem(sample)
    return Interval(mean=mean, low=mean - float(half), high=mean + float(half))


def paired_difference(a: Sequence[float], b: Sequence[float], confidence: float = 0.95) -> Interval:
    """Mean of a - b with the t interval of the paired differences, as of scipy's `ttest_rel`.

    a, b: one value a problem (or a seed), in the same order. Where all differences are equal the
    interval has no width. Raises ValueError on unequal lengths or no values.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape or first.size == 0:
        raise ValueError(f"pairs are needed, not {first.size} values and {second.size}")
    differences = first - second
    if first.size == 1 or np.ptp(differences) == 0:
        return mean_interval(differences.tolist(), confidence)
    with warnings.catch_warnings():
        # scipy warns of lost precision where all but a few differences are equal, as ours are.
        warnings.simplefilter("ignore", RuntimeWarning)
        ends = stats.ttest_rel(first, second).confidence_interval(confidence)
    return Interval(mean=float(differences.mean()), low=float(ends.low), high=float(ends.high))


def paired_by_key(
    a: Mapping[str, float], b: Mapping[str, float], confidence: float = 0.95
) -> Interval:
    """`paired_difference` of two mappings from problem (or seed) to value.

    Raises ValueError where they are not of the same problems.
    """
    if a.keys() != b.keys():
        odd = sorted(map(str, a.keys() ^ b.keys()))
        raise ValueError(f"{len(odd)} problems have no counterpart, such as {odd[0]}")
    keys = list(a)
    return paired_difference([a[key] for key in keys], [b[key] for key in keys], confidence)
