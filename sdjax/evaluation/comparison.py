"""Paired comparison of two evaluations of the same problems."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import stats

from sdjax.core.errors import UserError
from sdjax.evaluation.results import METRICS, ProblemResult, read_results
from sdjax.evaluation.statistics import accuracy_interval, paired_difference


def compare(first: Path, second: Path) -> str:
    """Return a table of both accuracies and their paired difference, B - A, with 95% intervals.

    `p` is the p-value of McNemar's exact test on the problems that only one of the two solves.

    Args:
        first: A, a results file or its folder.
        second: B, a results file or its folder.

    Raises:
        UserError: a file does not exist, the two have no problem in common, or a common problem
            has a different question or answer.
    """
    a, b = ({result.id: result for result in read_results(path)} for path in (first, second))
    ids = [id for id in a if id in b]
    if not ids:
        raise UserError(f"{first} and {second}: no problem in common; compare the same task")
    for id in ids:
        if (a[id].question, a[id].answer) != (b[id].question, b[id].answer):
            raise UserError(
                f"{first} and {second}: problem {id} has a different question or answer; compare "
                "results of the same data"
            )
    lines = [f"A {first}, B {second}: {len(ids)} problems in common, accuracy in %, 95% intervals"]
    for name, results, others in (("A", a, b), ("B", b, a)):
        if unpaired := len(results.keys() - others.keys()):
            lines.append(f"{unpaired} problems of {name} are skipped: the other does not have them")
    if different := sum(a[id].prompt_sha256 != b[id].prompt_sha256 for id in ids):
        lines.append(f"{different} problems have different prompts")
    for metric in METRICS:
        lines.append(_compare_metric(metric, [a[id] for id in ids], [b[id] for id in ids]))
    return "\n".join(lines)


def _compare_metric(metric: str, a: list[ProblemResult], b: list[ProblemResult]) -> str:
    correct = [[getattr(result, metric) for result in results] for results in (a, b)]
    cells = []
    for name, values in zip("AB", correct, strict=True):
        interval = accuracy_interval(values)
        cells.append(f"{name} {interval.in_percent()}")
    difference = paired_difference(correct[1], correct[0])
    only_a, only_b = (int(np.greater(x, y).sum()) for x, y in (correct, correct[::-1]))
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return (
        f"{metric:9s} {'  '.join(cells)}  B - A {difference.in_percent(signed=True)}  "
        f"only A {only_a}, only B {only_b}, p {p:.3g}"
    )
