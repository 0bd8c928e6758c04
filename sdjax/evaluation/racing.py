"""Racing: candidates answer more and more of the same problems, and clear losers stop early.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943) with a paired test: after each
rung, at most half of the candidates stop, and only those that are clearly worse than the worst of
the current winners. Candidates that are too close to tell apart all continue, so a race between
nearly equal candidates is an ordinary evaluation.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated

import numpy as np
from pydantic import Field
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, NonNegativeFloat, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Race:
    """The rules of a race.

    Attributes:
        first_rung: number of problems of the first rung; each further rung doubles it.
        winners: number of best candidates that must not stop; in a run, at least `test.top_k`.
        z: a candidate stops only if it is more than z standard errors below the worst current
            winner, problem by problem.
    """

    first_rung: Annotated[int, Field(ge=2)] = 40
    winners: PositiveInt = 5
    z: NonNegativeFloat = 2.0

    def rungs(self, problems: int) -> tuple[int, ...]:
        """Return the numbers of problems that have been answered after each rung.

        Args:
            problems: number of all problems.
        """
        rungs = []
        count = self.first_rung
        # A last rung that adds only a few problems would be a rung for nothing.
        while 4 * count <= 3 * problems:
            rungs.append(count)
            count *= 2
        return (*rungs, problems)

    def survivors(self, correct: Mapping[str, Sequence[bool]]) -> list[str]:
        """Return the candidates that continue, best first.

        Args:
            correct: by candidate, whether each problem so far was solved; the same problems in the
                same order.
        """
        names = sorted(correct, key=lambda name: (-sum(correct[name]), name))
        kept = max(self.winners, math.ceil(len(names) / 2))
        if len(names) <= kept:
            return names
        bar = np.asarray(correct[names[self.winners - 1]], dtype=np.float64)
        return names[:kept] + [
            name
            for name in names[kept:]
            if not self._is_worse(np.asarray(correct[name], dtype=np.float64), bar)
        ]

    def _is_worse(self, candidate: np.ndarray, bar: np.ndarray) -> bool:
        differences = candidate - bar
        error = differences.std(ddof=1) / math.sqrt(differences.size)
        return bool(differences.mean() < -self.z * error)


def race(
    candidates: Sequence[str],
    answer: Callable[[str, int], Sequence[bool]],
    problems: int,
    rules: Race,
    *,
    on_stop: Callable[[str], None] = lambda name: None,
    out_of_time: Callable[[], bool] = lambda: False,
) -> dict[str, tuple[bool, ...]]:
    """Run a race.

    Args:
        candidates: names of the candidates.
        answer: called with a candidate and a number of problems, which it grows; returns whether
            each of the first ones was solved.
        problems: number of problems; they must be in random order.
        rules: the rules.
        on_stop: called with each candidate that stops early or has answered all problems.
        out_of_time: called before each answer but the first; returns whether to end the race. The
            best `rules.winners` of those that have answered the most problems then answer the
            others, so that their results are complete.

    Returns:
        the results of each candidate, in the order of the problems; those that stopped early have
        fewer. If the race was ended, candidates that neither stopped nor answered all problems are
        missing.
    """
    correct: dict[str, tuple[bool, ...]] = dict.fromkeys(candidates, ())
    running = list(candidates)
    for rung in rules.rungs(problems):
        for name in running:
            if any(correct.values()) and out_of_time():
                return _finish_leaders(correct, running, answer, problems, rules, on_stop)
            correct[name] = tuple(answer(name, rung))
        survivors = rules.survivors({name: correct[name] for name in running})
        for name in running:
            if rung == problems or name not in survivors:
                on_stop(name)
        running = survivors
    return correct


def _finish_leaders(
    correct: dict[str, tuple[bool, ...]],
    running: Sequence[str],
    answer: Callable[[str, int], Sequence[bool]],
    problems: int,
    rules: Race,
    on_stop: Callable[[str], None],
) -> dict[str, tuple[bool, ...]]:
    """Have the leaders answer all problems; return the results without the other running ones."""

    def key(name: str) -> tuple[int, int, str]:
        return (-len(correct[name]), -sum(correct[name]), name)

    leaders = sorted((name for name in running if correct[name]), key=key)[: rules.winners]
    for name in leaders:
        for rung in rules.rungs(problems):
            if rung > len(correct[name]):
                correct[name] = tuple(answer(name, rung))
        on_stop(name)
    left_out = set(running) - set(leaders)
    return {name: found for name, found in correct.items() if name not in left_out}
