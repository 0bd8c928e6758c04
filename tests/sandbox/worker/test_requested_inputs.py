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
    assert text.startswith(("no hyperparameter", "hyperparameter"))
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


@pytest.mark.parametrize(
    "annotation",
    [
        "print('evaluated') and float",
        "[None for _ in iter(int, 1)] and float",
        "(lambda: float)()",
        "float if task_vectors else float",
        "list[print('evaluated')]",
    ],
)
def test_annotation_in_a_string_must_be_a_type(signature, capsys, annotation):
    source = merge("return x * task_vectors['expert_1']", f'task_vectors, x: "{annotation}" = 0.7')
    for head in ("", "from __future__ import annotations\n"):
        assert "an annotation must be a type" in refusal(signature, head + source)
    assert "evaluated" not in capsys.readouterr().out


@pytest.mark.parametrize(
    "annotation",
    ["__import__('os').getpid", "list['__import__']", "jnp.load", "list['list[\\'eval\\']']"],
)
def test_text_rules_apply_to_annotations_in_strings(signature, annotation):
    annotation = repr(annotation)
    for body in (f"x: {annotation} = 1\nreturn x", "return 0.5"):
        message = refusal(signature, merge(body, f"task_vectors, y: {annotation} = 0.7"))
        assert "is not allowed" in message
    assert "is not allowed" in refusal(signature, merge(f"x: {annotation} = 1\nreturn 0.5"))


def test_annotations_are_looked_up_and_never_evaluated(signature, capsys):
    """The text rules do not see an annotation that is evaluated with `from __future__`."""
    source = "from __future__ import annotations\nimport sdjax\n" + merge(
        "return a * task_vectors['expert_1'] + w['expert_1'] * b",
        "task_vectors, a: float = 0.5, w: sdjax.PerExpert = 0.1, b: print('evaluated') = 1, "
        "c: [n for n in iter(int, 1)] = 0",
    )
    assert set(trace(signature, source)["hyperparameters"]) == {"a", "w.1", "w.2", "w.3"}
    assert "evaluated" not in capsys.readouterr().out


def test_names_of_types_may_be_rebound(signature):
    source = "number = float\n" + merge("return a * task_vectors['expert_1']", "t, a: 'number' = 1")
    source = source.replace("merge_models(t,", "merge_models(task_vectors,")
    assert trace(signature, source)["hyperparameters"] == {"a": 1.0}


@pytest.mark.parametrize(
    "use",
    [
        "isinstance(x, Float[Array, '{print(1)} b'])",
        "isinstance(x, Float[Array, 'print(1)'])",
        "isinstance(x, Float[Array, 'a+1'])",
        "isinstance(x, Float[Array, 'pri' + 'nt(1)'])",
        "isinstance(x, [Float][0][Array, 'print(1)'])",
    ],
)
def test_dimensions_of_annotations_are_plain(signature, use):
    head = "from jaxtyping import Array, Float\n"
    body = "x = task_vectors['expert_1']\nreturn x if {} else -x"
    assert "refused" not in trace(signature, head + merge(body.format("isinstance(x, Array)")))
    plain = "isinstance(x, Float[Array, '*batch #rows 8']) or isinstance(x, Float[Array, '...'])"
    trace(signature, head + merge(body.format(plain)))
    message = refusal(signature, head + merge(body.format(use)))
    assert "names and numbers" in message or "in full" in message
    renamed = head.replace("Float", "Float as F")
    assert refusal(signature, renamed + merge(body.format(use.replace("Float", "F"))))


@pytest.mark.parametrize(
    "source",
    [
        "import jaxtyping\n" + merge("return 0.5"),
        "import typing\n" + merge("typing.get_type_hints(print)\nreturn 0.5"),
        "from typing import ForwardRef\n" + merge("return 0.5"),
        "import functools\n" + merge("functools.singledispatch(print)\nreturn 0.5"),
        "from operator import attrgetter\n" + merge("return 0.5"),
    ],
)
def test_functions_that_evaluate_strings_are_refused(signature, source):
    assert "allowed" in refusal(signature, source) or "write" in refusal(signature, source)
