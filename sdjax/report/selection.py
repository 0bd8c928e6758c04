"""Overestimation of the best program by its development score, by number of programs.

The best of many programs is partly the luckiest one, so its development score exceeds what it
solves of other problems, by more the more programs were tried. Two estimates:

- The program that was the best one after 1, 2, 4, ... programs is scored on the confirmation and
  the test problems, and each score is subtracted from its development score.
- In random orders of the programs, the best of the first n on a random half of the development
  problems is scored on the other half. That needs no other problems and averages over orders, but
  overestimates more, as it selects by half of the problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from sdjax.evaluation.statistics import Interval, accuracy_interval, independent_difference
from sdjax.search.ranking import correct_answers, programs_of, winners_so_far
from sdjax.search.store import Store
from sdjax.search.types import CONFIRMATION, DEVELOPMENT, SEARCH, TEST

_ORDERS = 200
_CELLS = 20_000_000  # of programs times problems times orders, above which there are fewer orders


@dataclass(frozen=True, kw_only=True)
class BestSoFar:
    """The best program among the first ones, by development score.

    Attributes:
        tried: number of programs that were tried.
        name: name of the entry.
        development: its development score; in a race, on the problems that it has answered.
        minus_confirmation: the development minus the confirmation score; None without one.
        minus_test: the development minus the test score; None without one.
    """

    tried: int
    name: str
    development: float
    minus_confirmation: Interval | None
    minus_test: Interval | None


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Estimates of how much selection overestimates.

    Attributes:
        bests: the best programs so far.
        halves: mean score on the half that selects minus that on the other half, by number of
            programs.
    """

    bests: tuple[BestSoFar, ...]
    halves: dict[int, float]


def read_selection(store: Store, metric: str) -> Selection:
    """Return both estimates for a run; empty if no program has a score.

    Args:
        store: the run's store.
        metric: the run's metric.
    """
    winners = winners_so_far(store, metric)
    development = correct_answers(store, DEVELOPMENT, metric)
    others = {split: correct_answers(store, split, metric) for split in (CONFIRMATION, TEST)}

    def minus(name: str, split: str) -> Interval | None:
        if name not in others[split]:
            return None
        a, b = (list(x[name].values()) for x in (development, others[split]))
        return independent_difference(accuracy_interval(a), accuracy_interval(b))

    own = programs_of(store, SEARCH)
    return Selection(
        bests=tuple(
            BestSoFar(
                tried=tried,
                name=name,
                development=float(np.mean(list(development[name].values()))),
                minus_confirmation=minus(name, CONFIRMATION),
                minus_test=minus(name, TEST),
            )
            for tried, name in winners.items()
        ),
        halves=_halves({name: x for name, x in development.items() if name in own}, list(winners)),
    )


def _halves(correct: dict[str, dict[str, bool]], counts: list[int]) -> dict[int, float]:
    problems = sorted({problem for answers in correct.values() for problem in answers})
    if len(problems) < 2:
        return {}
    column = {problem: number for number, problem in enumerate(problems)}
    answered = np.zeros((len(correct), len(problems)), bool)
    solved = np.zeros_like(answered)
    for row, name in enumerate(sorted(correct)):
        for problem, value in correct[name].items():
            answered[row, column[problem]] = True
            solved[row, column[problem]] = value
    return overestimate_by_halves(solved, answered, counts)


def overestimate_by_halves(
    solved: Bool[np.ndarray, "programs problems"],
    answered: Bool[np.ndarray, "programs problems"],
    counts: list[int],
) -> dict[int, float]:
    """Return the mean score of the best program on the half that selects it minus on the other.

    The best of the first n programs of an order is, of those that have answered the most problems,
    the one with the best score on the half.

    Args:
        solved: whether a program has solved a problem.
        answered: whether it has answered it.
        counts: the numbers of programs n.
    """
    rng = np.random.default_rng(0)
    programs, problems = solved.shape
    orders = int(np.clip(_CELLS // solved.size, 8, _ORDERS))
    totals = np.zeros((orders, len(counts)))
    for number in range(orders):
        half = np.zeros(problems, bool)
        half[rng.permutation(problems)[: problems // 2]] = True
        first, second = _scores(solved, answered, half), _scores(solved, answered, ~half)
        key = (answered.sum(1) + first)[order := rng.permutation(programs)]
        best_key = np.maximum.accumulate(key)
        place = np.maximum.accumulate(np.where(key == best_key, np.arange(programs), 0))
        best = order[place[np.array(counts) - 1]]
        totals[number] = first[best] - second[best]
    return {n: float(mean) for n, mean in zip(counts, totals.mean(0), strict=True)}


def _scores(
    solved: Bool[np.ndarray, "programs problems"],
    answered: Bool[np.ndarray, "programs problems"],
    half: Bool[np.ndarray, " problems"],
) -> Float[np.ndarray, " programs"]:
    """Return the accuracy of each program on the problems of a half that it has answered."""
    count = answered[:, half].sum(1)
    return solved[:, half].sum(1) / np.maximum(count, 1)
