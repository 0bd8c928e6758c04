"""Paired comparison of two evaluations of the same problems."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from scipy import stats

from sdjax.core.errors import UserError
from sdjax.evaluation.results import EQUAL_METRICS, METRICS, ProblemResult, read_results
from sdjax.evaluation.statistics import accuracy_interval, aligned_percents, paired_difference


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
    return "\n".join([*lines, *_table([a[id] for id in ids], [b[id] for id in ids])])


def _table(a: list[ProblemResult], b: list[ProblemResult]) -> list[str]:
    """Return one line per metric, or a single one if the metrics agree on every problem."""
    equal = all(result.strict == result.flexible for result in (*a, *b))
    metrics = METRICS[:1] if equal else METRICS
    correct = [[[getattr(r, metric) for r in results] for metric in metrics] for results in (a, b)]
    names = ["accuracy"] if equal else [metric.ljust(8) for metric in metrics]
    firsts, seconds = (
        aligned_percents([accuracy_interval(values) for values in results]) for results in correct
    )
    differences = aligned_percents(
        [paired_difference(y, x) for x, y in zip(*correct, strict=True)], signed=True
    )
    counts = [_only_one_solves(x, y) for x, y in zip(*correct, strict=True)]
    lines = [
        f"{name}  A {first}  B {second}  B - A {difference}  {count}"
        for name, first, second, difference, count in zip(
            names, firsts, seconds, differences, counts, strict=True
        )
    ]
    return [*lines, EQUAL_METRICS] if equal else lines


def _only_one_solves(a: list[bool], b: list[bool]) -> str:
    only_a, only_b = int(np.greater(a, b).sum()), int(np.greater(b, a).sum())
    p = stats.binomtest(only_a, only_a + only_b).pvalue if only_a + only_b else 1.0
    return f"only A {only_a}, only B {only_b}, p {p:.3g}"
