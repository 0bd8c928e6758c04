"""Reports of a search: the reason for CMA-ES, and that nothing better was found."""

import dataclasses
import json
from types import SimpleNamespace

import numpy as np
import pytest

import sdjax
from sdjax.core.errors import UserError
from sdjax.tuning import api
from sdjax.tuning.search import SearchConfig
from sdjax.tuning.trace import Trace
from tests.tuning.searches import OPTIMUM, Objective, tunable


def search(config, objective=None, tuned=None):
    """Search with a formula in place of decoded scores and of the loss."""
    objective = objective or Objective()
    setup = SimpleNamespace(
        tunable=tuned or tunable(),
        development=["a", "b"],
        confirmation=["c", "d"],
        training=["e"],
        task=SimpleNamespace(name="sums"),
        config=None,
        decoder=SimpleNamespace(compute_dtype=np.float32),
        notes=(),
    )
    weights = SimpleNamespace(
        merger=None, base=None, scorer=lambda values, problems: objective.evaluate(values)
    )
    return api._search(setup, weights, config, "strict", Trace())


@pytest.fixture
def blocked(monkeypatch):
    """Replace the loss by a formula; the returned dict names the numbers without a gradient."""
    found = {}

    class Loss:
        def __init__(self, *_, **__):
            pass

        def blocking(self):
            return found

        def __call__(self, values, start, step):
            return Objective().loss_and_gradient(values, start, step)

    monkeypatch.setattr(api, "MergeLoss", Loss)
    return found


def test_initial_values_that_are_the_best_are_reported():
    text = search(SearchConfig(budget=1, optimizer="cmaes")).summary()
    assert ", 1 development evaluation, " in text
    assert text.endswith("\nthe budget allowed to evaluate the initial values only; raise --budget")
    at_optimum = dataclasses.replace(
        tunable(),
        parameters=tuple(
            dataclasses.replace(parameter, start=float(value))
            for parameter, value in zip(tunable().parameters, OPTIMUM, strict=True)
        ),
    )
    text = search(SearchConfig(budget=4, optimizer="cmaes"), tuned=at_optimum).summary()
    assert text.endswith("\nno better values were found; these are the initial ones")
    found = search(SearchConfig(budget=12, optimizer="cmaes"))
    assert found.values != (0.0, 0.0)
    assert found.notes == ()


def test_early_stop_is_reported(blocked):
    class Worse(Objective):
        def evaluate(self, values):
            result = super().evaluate(values)
            return result | {"score": 1 / self.evaluated}

    config = SearchConfig(budget=50, steps=40, evaluate_every=1, patience=3)
    text = search(config, Worse()).summary()
    assert (
        ", 4 development evaluations, 3 gradient steps, stopped early after 3 of 40 steps" in text
    )
    text = search(SearchConfig(budget=1, steps=1)).summary()
    assert ", 1 development evaluation, 1 gradient step, " in text


def test_optimizer_gradient_is_refused_for_a_number_without_a_gradient(blocked):
    blocked[1] = ("gt",)
    config = SearchConfig(budget=2, steps=2, optimizer="gradient")
    with pytest.raises(UserError) as error:
        search(config)
    assert str(error.value) == (
        "test cannot be tuned by gradient: no gradient in weight[expert_2] (gt); use --optimizer "
        "auto"
    )
    result = search(dataclasses.replace(config, optimizer="auto"))
    assert result.optimizers == ("gradient", "cmaes")
    assert "no gradient in weight[expert_2] (gt): tuned by CMA-ES" in result.notes


def test_optimizer_gradient_is_refused_without_training_problems(tmp_path):
    rows = [{"question": f"{i}+1=", "answer": str(i + 1)} for i in range(4)]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"has no training problems; use --optimizer auto") as error:
        sdjax.tune(
            "weights",
            str(file),
            base="zoo:seed",
            experts=["zoo:reader"],
            budget=1,
            optimizer="gradient",
            out=tmp_path / "out",
        )
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()
