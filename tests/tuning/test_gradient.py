"""Search by gradient: convergence, bounds, early stopping, dropped steps."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import sdjax
from sdjax.core.config import dataclass_from
from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.testing import random_params, tiny_model
from sdjax.training.packing import Example
from sdjax.tuning.gradient import search_by_gradient
from sdjax.tuning.loss import MergeLoss
from sdjax.tuning.search import SearchConfig, override_parameters
from sdjax.tuning.trace import Trace
from tests.tuning.searches import OPTIMUM, Objective, tunable


def search(config, objective=None, loss_and_gradient=None, **changes):
    objective, trace = objective or Objective(), Trace()
    evaluations = objective.evaluations(config, trace)
    search_by_gradient(
        tunable(**changes),
        loss_and_gradient or objective.loss_and_gradient,
        evaluations,
        config,
        trace,
    )
    return evaluations, trace


def of_kind(trace, kind):
    return [event for event in trace.events if event["event"] == kind]


def test_finds_the_minimum_and_evaluates_as_often_as_the_budget_allows():
    config = SearchConfig(budget=4, steps=60, learning_rate=0.04)
    evaluations, trace = search(config)
    np.testing.assert_allclose(evaluations.best["values"], OPTIMUM, atol=0.02)
    assert [event["step"] for event in of_kind(trace, "evaluation")] == [0, 20, 40, 60]
    assert len(of_kind(trace, "step")) == 60
    _, trace = search(SearchConfig(budget=1, steps=3))
    assert [event["step"] for event in of_kind(trace, "evaluation")] == [3]


def test_values_stay_within_the_bounds_and_are_those_that_are_written():
    def upward(values, start, step):
        return 0.0, np.array([-1.0, 1.0])

    _, trace = search(SearchConfig(budget=2, steps=8, learning_rate=0.3), loss_and_gradient=upward)
    assert of_kind(trace, "evaluation")[-1]["values"] == [1.0, -1.0]
    for event in trace.events:
        assert event["values"] == [float(f"{value:.6g}") for value in event["values"]]


def test_start_ends_when_the_score_stops_improving():
    config = SearchConfig(budget=50, steps=40, evaluate_every=1, patience=3)
    objective = Objective()

    def away(values, start, step):
        return 0.0, OPTIMUM - values

    evaluations, _ = search(config, objective, away)
    assert objective.evaluated == 4
    assert evaluations.best["step"] == 0


def test_starts_share_the_budget_and_begin_elsewhere():
    config = SearchConfig(budget=7, steps=20, starts=3)
    _, trace = search(config)
    found = of_kind(trace, "evaluation")
    assert [sum(e["start"] == start for e in found) for start in range(3)] == [3, 2, 2]
    first = [next(e["values"] for e in found if e["start"] == start) for start in range(3)]
    assert first[0] == [0.0, 0.0]
    assert len({tuple(values) for values in first}) == 3


@pytest.mark.parametrize("bad", [(np.nan, np.zeros(2)), (1.0, np.array([0.0, np.inf]))])
def test_step_without_a_finite_gradient_is_dropped_and_three_end_the_start(bad):
    objective = Objective()

    def sometimes(values, start, step):
        good = objective.loss_and_gradient(values, start, step)
        return bad if (start, step) == (0, 2) or start == 1 else good

    _, trace = search(SearchConfig(budget=2, steps=5, starts=2), objective, sometimes)
    steps = of_kind(trace, "step")
    dropped = [(e["start"], e["step"]) for e in steps if e["gradient"] is None]
    assert dropped == [(0, 2), (1, 0), (1, 1), (1, 2)]
    assert len(steps) == 5 + 3
    assert steps[3]["values"] == steps[2]["values"] != steps[4]["values"]
    # The second start ends with an evaluation of its last values.
    assert [(e["start"], e["step"]) for e in of_kind(trace, "evaluation")] == [(0, 5), (1, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budget": 0}, "budget: 0 is less than one evaluation of the development problems"),
        ({"budget": 2, "starts": 3}, "budget: 2 is less than one evaluation for each of 3 starts"),
        ({"budget": 2, "steps": 0}, "steps"),
    ],
)
def test_invalid_settings_raise_user_error(changes, message):
    with pytest.raises(UserError, match=message):
        dataclass_from(SearchConfig, changes, "tune")


def test_starts_and_bounds_can_be_changed():
    changed = override_parameters(tunable(), {"weight[expert_2]": (0.5, 0.0, 3.0)})
    assert changed.start.tolist() == [0.0, 0.5]
    assert changed.bounds.tolist() == [[-1.0, 1.0], [0.0, 3.0]]
    with pytest.raises(UserError, match=r"weight\[expert_1\]: the bounds \[-1, 1\] exclude the st"):
        override_parameters(tunable(), {"weight[expert_1]": (2.0,)})
    with pytest.raises(UserError, match=r"no number 'wieght' to tune; available: weight\[expert_1"):
        override_parameters(tunable(), {"wieght": (2.0,)})


def test_program_whose_gradient_is_nan_ends_the_start():
    def directions(task_vectors, a: float = 0.5, b: float = 0.5):
        first, second = task_vectors.values()
        second = b * second
        norm = jnp.sqrt(jnp.sum(second**2))  # its derivative at zero is infinite
        return a * first + jnp.where(norm > 0, second / jnp.where(norm > 0, norm, 1.0), 0.0)

    made = Algorithm.from_function(directions)
    tuned = dataclasses.replace(tunable(start=0.5), bind=lambda v: made.bind(a=v[0], b=v[1]))
    config, base = tiny_model(max_seq_len=16, num_layers=1)
    search_config = SearchConfig(budget=2, steps=5, batch=2)
    loss = MergeLoss(
        sdjax.Merger(base, [random_params(config, seed=1), base], scope="mlp"),
        tuned,
        base,
        config=config,
        compute_dtype=jnp.float32,
        key=jax.random.key(0),
        examples=[Example(prompt=(5, 6 + i), target=(9, 1)) for i in range(8)],
        search=search_config,
    )
    assert loss.blocking() == {}
    value, gradient = loss(tuned.start, 0, 0)
    assert np.isfinite(value)
    assert np.isfinite(gradient).tolist() == [True, False]
    trace, objective = Trace(), Objective()
    evaluations = objective.evaluations(search_config, trace)
    search_by_gradient(tuned, loss, evaluations, search_config, trace)
    steps = of_kind(trace, "step")
    assert [(event["values"], event["gradient"]) for event in steps] == [([0.5, 0.5], None)] * 3
    assert evaluations.best["values"] == [0.5, 0.5]
