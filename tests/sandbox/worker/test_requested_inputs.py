"""Hyperparameters of candidates, and values that the user sets."""

import dataclasses
import json

import pytest
from catalogue import merge

from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.worker.trace import trace_trusted

PARAMETERS = "task_vectors, weight: PerExpert = 0.5, scale: float = 2.0, mode: str = 'sum'"
SOURCE = "from sdjax import PerExpert\n" + merge(
    "total = sum(weight[name] * vector for name, vector in task_vectors.items())\n"
    "return scale * total if mode == 'sum' else total",
    PARAMETERS,
)


def trace(signature, source=SOURCE, **parameters):
    signature = dataclasses.replace(signature, parameters=tuple(parameters.items()))
    return json.loads(trace_trusted(source, signature))


def refusal(signature, source=SOURCE, **parameters):
    with pytest.raises(Refusal) as caught:
        trace(signature, source, **parameters)
    return caught.value.message


def test_per_expert_is_one_scalar_per_expert(signature):
    scalars = trace(signature)["hyperparameters"]
    assert scalars == {"scale": 2.0, "weight.1": 0.5, "weight.2": 0.5, "weight.3": 0.5}
    later = "from __future__ import annotations\n" + SOURCE
    assert trace(signature, later)["hyperparameters"] == scalars
    for default in ("[0.1, 0.2, 0.3]", "{'expert_3': 0.3, 'expert_1': 0.1, 'expert_2': 0.2}"):
        scalars = trace(signature, SOURCE.replace("0.5", default))["hyperparameters"]
        assert [scalars[f"weight.{number}"] for number in (1, 2, 3)] == [0.1, 0.2, 0.3]


def test_only_values_of_static_hyperparameters_change_the_program(signature):
    as_written = trace(signature)
    assert trace(signature, weight=0.25, scale=3, mode="sum") == as_written
    assert trace(signature, weight=(0.1, 0.2, 0.3), scale=None) == as_written
    assert trace(signature, mode="mean") != as_written


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"wieght": 0.5}, "no hyperparameter 'wieght'; did you mean weight? available: weight: "),
        ({"depth": 0.5}, "no hyperparameter 'depth'"),
        ({"mode": 3}, "'mode' must be a string, not 3"),
        ({"mode": None}, "'mode' has a single value for the whole merge"),
        ({"scale": "big"}, "'scale' must be a finite number, not 'big'"),
        ({"weight": "big"}, "'weight' must be a finite number, a list"),
    ],
)
def test_mistakes_list_the_hyperparameters(signature, parameters, message):
    text = refusal(signature, **parameters)
    assert message in text
    assert "weight: PerExpert = 0.5, scale: float = 2.0, mode: str = 'sum'" in text


@pytest.mark.parametrize("default", ["'x'", "[1.0, 2.0]", "{'expert_1': 1.0}", "1e39"])
def test_default_of_a_per_expert_must_fit_the_experts(signature, default):
    assert "weight" in refusal(signature, SOURCE.replace("0.5", default))


def test_parameters_of_other_types_keep_their_defaults(signature):
    parameters = "task_vectors, a=0.5, b: list = [1.0], c: Unknown = None, d: bool = 1"
    source = "from __future__ import annotations\n" + merge(
        "return a * b[0] * task_vectors['expert_1'] * d", parameters
    )
    assert trace(signature, source)["hyperparameters"] == {}
    assert "available: none" in refusal(signature, source, a=0.3)


def test_unknown_expert_is_reported_with_the_experts(signature):
    message = refusal(signature, merge("return task_vectors['expert_9']"))
    assert message.endswith(
        "KeyError: 'expert_9'; the experts in task_vectors are expert_1, expert_2, expert_3"
    )
