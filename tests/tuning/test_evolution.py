"""Search by CMA-ES: convergence, budget, a single number, and continuation of another search."""

import numpy as np
import pytest

from sdjax.tuning.evolution import search_by_evolution
from sdjax.tuning.search import SearchConfig
from sdjax.tuning.trace import Trace
from tests.tuning.searches import OPTIMUM, Objective, tunable


@pytest.mark.parametrize("count", [1, 2])
def test_finds_the_optimum_within_the_budget(count):
    config, objective, trace = SearchConfig(budget=120), Objective(), Trace()
    evaluations = objective.evaluations(config, trace)
    search_by_evolution(tunable(count), evaluations, config)
    assert objective.evaluated == evaluations.count == 120
    np.testing.assert_allclose(evaluations.best["values"], OPTIMUM[:count], atol=0.05)
    values = np.array([event["values"] for event in trace.events])
    assert values[0].tolist() == [0.0] * count
    assert np.all(np.abs(values) <= 1)


def test_seed_determines_the_search_and_starts_share_the_budget():
    def values(seed):
        config, trace = SearchConfig(budget=9, seed=seed, starts=2), Trace()
        search_by_evolution(tunable(), Objective().evaluations(config, trace), config)
        assert [event["start"] for event in trace.events] == [0] * 5 + [1] * 4
        return [event["values"] for event in trace.events]

    assert values(1) == values(1) != values(2)


def test_continues_from_the_best_values_with_the_rest_of_the_budget():
    config, objective, trace = SearchConfig(budget=6), Objective(), Trace()
    evaluations = objective.evaluations(config, trace)
    evaluations(np.array([0.7, -0.2]), start=0, step=0)
    evaluations(np.array([-0.7, 0.2]), start=0, step=1)
    search_by_evolution(tunable(), evaluations, config, resume=True)
    assert objective.evaluated == 6
    mean = np.mean([event["values"] for event in trace.events[2:]], axis=0)
    assert np.linalg.norm(mean - [0.7, -0.2]) < np.linalg.norm(mean - [-0.7, 0.2])


def test_ends_after_generations_without_improvement():
    config, objective, trace = SearchConfig(budget=500, population=4), Objective(), Trace()
    evaluations = objective.evaluations(config, trace)
    search_by_evolution(tunable(), evaluations, config, patience=2)
    assert 1 + 2 * 4 <= evaluations.count < 500
    scores = [event["score"] for event in trace.events]
    assert max(scores[:-8]) >= max(scores[-8:])
    assert evaluations.best["score"] > 0.9
