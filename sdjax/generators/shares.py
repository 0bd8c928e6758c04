"""Shares of several generators in the samples of an iteration, by a bandit on what they find.

Thompson sampling [1] in batches [2]: a sample of a generator is a success if it found one of the
best programs, so that its rate of success has the posterior Beta(1 + successes, 1 + samples -
successes) under a uniform prior. For each sample of the next iteration, one rate per generator is
drawn from its posterior, and the generator with the largest one writes the sample. Hence a
generator's share is the probability that it is the best one, given the iterations before. Each
generator first gets its minimum share, so that one that starts badly, or becomes better by
training, is still tried.

The shares depend only on a random seed and on the results of earlier iterations, so that a resumed
run assigns the samples in the same way. The first iteration is divided equally.

References:
    [1] Thompson, "On the likelihood that one unknown probability exceeds another in view of the
        evidence of two samples", Biometrika 25, 1933.
    [2] Chapelle and Li, "An empirical evaluation of Thompson sampling", NeurIPS 2011, section 4:
        feedback in batches.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Record:
    """What a generator has found so far.

    Attributes:
        samples: number of its samples in earlier iterations.
        successes: number of them that found one of the best programs.
        remaining: number of samples that it can still write; None is unlimited.
    """

    samples: int = 0
    successes: int = 0
    remaining: int | None = None


def assign_samples(
    records: Mapping[str, Record],
    count: int,
    *,
    minimum: float,
    rng: np.random.Generator,
) -> tuple[str, ...]:
    """Return the generator of each sample of an iteration, in random order.

    Args:
        records: mapping from generator to its record, in a fixed order.
        count: number of samples.
        minimum: fraction of the samples that each generator gets at least, rounded down but at
            least one if it is positive and there are as many samples as generators.
        rng: the only source of randomness.

    Returns:
        [count] names; fewer if all generators have too few samples left.

    Examples:
        >>> rng = np.random.default_rng(0)
        >>> records = {"a": Record(samples=50, successes=30), "b": Record(samples=50)}
        >>> names = assign_samples(records, 20, minimum=0.1, rng=rng)
        >>> names.count("a"), names.count("b")
        (18, 2)
    """
    left = {name: _remaining(record, count) for name, record in records.items()}
    reserved = int(minimum * count) or (1 if minimum > 0 and count >= len(records) else 0)
    if any(record.samples for record in records.values()):
        names = [name for name in records for _ in range(min(reserved, left[name]))]
    else:
        names = _equal_shares(left, count)
    for name in names:
        left[name] -= 1
    while len(names) < count and any(left.values()):
        name = _draw(records, [name for name in records if left[name]], rng)
        names.append(name)
        left[name] -= 1
    return tuple(names[index] for index in rng.permutation(len(names)))


def _equal_shares(left: Mapping[str, int], count: int) -> list[str]:
    """Return names in turn, until there are enough or a round would be incomplete."""
    rounds = count // len(left)
    return [name for number in range(rounds) for name in left if number < left[name]]


def _draw(records: Mapping[str, Record], names: Sequence[str], rng: np.random.Generator) -> str:
    rates = [
        rng.beta(1 + records[n].successes, 1 + records[n].samples - records[n].successes)
        for n in names
    ]
    return names[int(np.argmax(rates))]


def _remaining(record: Record, count: int) -> int:
    return count if record.remaining is None else min(record.remaining, count)
