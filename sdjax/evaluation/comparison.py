"""`sdjax eval --compare A B`: two evaluations of the same problems, paired problem by problem."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import stats

from sdjax.core.errors import UserError
from sdjax.evaluation.results import READINGS, Line, read_results
from sdjax.evaluation.statistics import accuracy_interval, paired_difference


def compare(first: Path, second: Path) -> str:
    """A table of both accuracies and their paired difference, B - A, with 95 % intervals.

    `p` is McNemar's exact test: the probability of so uneven a split of the problems that only one
    of the two solves, if neither is better.

    Raises:
        UserError: no such file, no problem in common, or one that asks differently.
    """
    a, b = ({line.id: line for line in read_results(path)} for path in (first, second))
    ids = [id for id in a if id in b]
    if not ids:
        raise UserError(f"{first} and {second}: have no problem in common")
    for id in ids:
        if (a[id].question, a[id].answer) != (b[id].question, b[id].answer):
            raise UserError(f"{first} and {second}: ask something else in problem {id}")
    lines = [f"A {first}, B {second}: {len(ids)} problems in common, 95 % intervals"]
    for name, own, other in (("A", a, b), ("B", b, a)):
        if left := len(own.keys() - other.keys()):
            lines.append(f"{left} problems of {name} are left out, as the other lacks them")
    if prompts := sum(a[id].prompt_sha256 != b[id].prompt_sha256 for id in ids):
        lines.append(f"{prompts} problems were put by another prompt")
    for reading in READINGS:
        lines.append(_row(reading, [a[id] for id in ids], [b[id] for id in ids]))
    return "\n".join(lines)


def _row(reading: str, a: list[Line], b: list[Line]) -> str:
    right = [[getattr(line, reading) for line in lines] for lines in (a, b)]
    cells = []
    for name, one in zip("AB", right, strict=True):
        interval = accuracy_interval(one)
        cells.append(f"{name} {interval.mean:.3f} [{interval.low:.3f}, {interval.high:.3f}]")
    difference = paired_difference(right[1], right[0])
    only_a, only_b = (int(np.greater(x, y).sum()) for x, y in (right, right[::-1]))
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return (
        f"{reading:9s} {'  '.join(cells)}  B - A {difference.mean:+.3f} "
        f"[{difference.low:+.3f}, {difference.high:+.3f}]  "
        f"only A {only_a}, only B {only_b}, p {p:.3g}"
    )
