"""Search by CMA-ES (Hansen 2016, arXiv 1604.00772), with the library `cmaes`.

Axes: parameters.
"""

from __future__ import annotations

import math

import numpy as np
from cmaes import CMA

from sdjax.tuning.search import Box, Evaluations, SearchConfig
from sdjax.tuning.types import Tunable

_MIN_DIMENSIONS = 2  # of the library


def search_by_evolution(
    tunable: Tunable,
    evaluations: Evaluations,
    config: SearchConfig,
    *,
    resume: bool = False,
    patience: int | None = None,
) -> None:
    """Maximize the development score.

    Each start evaluates its initial values first, which are the mean of its first generation. A
    start whose distribution has collapsed leaves its budget to the next one.

    Args:
        tunable: what is tuned.
        evaluations: the development evaluations, whose `best` is the result.
        config: settings of the search.
        resume: make one start, from the best values so far, with what is left of the budget.
        patience: generations that do not improve the best score, in a row, after which a start
            ends; by default, a start does not end for that.
    """
    box = Box(tunable)
    size = len(tunable.parameters)
    for start in range(1 if resume else config.starts):
        if resume and evaluations.best is not None:
            initial, last = box.scaled(evaluations.best["values"]), config.budget
        else:
            initial = box.initial(start, config.seed)
            last = sum(config.share(earlier) for earlier in range(start + 1))
            evaluations(box.values(initial), start=start, generation=0)
        dimensions = max(size, _MIN_DIMENSIONS)  # further ones have no effect
        optimizer = CMA(
            mean=np.concatenate([initial, np.full(dimensions - size, 0.5)]),
            sigma=config.sigma,
            bounds=np.array([(0.0, 1.0)] * dimensions),
            seed=config.seed + start,
            population_size=config.population,
        )
        stale = 0
        while evaluations.count < last and not optimizer.should_stop() and stale != patience:
            generation, best = [], _best_score(evaluations)
            for _ in range(min(optimizer.population_size, last - evaluations.count)):
                scaled = optimizer.ask()
                score = evaluations(
                    box.values(scaled[:size]), start=start, generation=optimizer.generation + 1
                )
                generation.append((scaled, -score))
            if len(generation) == optimizer.population_size:
                optimizer.tell(generation)
            stale = 0 if _best_score(evaluations) > best else stale + 1


def _best_score(evaluations: Evaluations) -> float:
    return -math.inf if evaluations.best is None else evaluations.best["score"]
