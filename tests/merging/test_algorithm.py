import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm, PerExpert


def scaled(
    task_vectors, base, depth, weight: PerExpert = 1.0, scale: float = 2.0, fair: bool = True
):
    return scale * sum(weight[name] * vector for name, vector in task_vectors.items())


def test_from_function_reads_inputs_and_hyperparameters():
    algorithm = Algorithm.from_function(scaled, scale=3)
    assert algorithm.form == "tensor"
    assert algorithm.requests == {"base", "depth"}
    assert algorithm.hyperparameters == {"weight": 1.0, "scale": 3.0, "fair": True}
    assert algorithm.traced == {"weight": "per_expert", "scale": "float"}
    assert algorithm.static == {"fair": True}


def test_merge_trees_has_the_tree_form():
    def merge_trees(task_vectors, base, key):
        return base

    assert Algorithm.from_function(merge_trees).form == "tree"

    def wrong(task_vectors, depth):
        return task_vectors

    wrong.__name__ = "merge_trees"
    with pytest.raises(UserError, match="'depth' is not available in the tree form"):
        Algorithm.from_function(wrong)


def test_identity_contains_static_values_only():
    one = Algorithm.from_function(scaled)
    assert one.bind(scale=0.1, weight=(1, 2)).identity == one.identity
    assert Algorithm.from_function(scaled, scale=9).identity == one.identity
    assert one.bind(fair=False).identity != one.identity


def test_closures_with_the_same_name_have_distinct_identities():
    def make(factor):
        return lambda task_vectors: factor * task_vectors["expert_1"]

    two, three = make(2), make(3)
    identities = [Algorithm.from_function(f).identity for f in (two, three, two)]
    assert identities[0] != identities[1]
    assert identities[0] == identities[2]


def test_redefined_function_has_a_new_identity():
    def define(factor):
        space = {"__name__": "notebook"}
        exec(f"def merge_models(task_vectors): return {factor}", space)
        return space["merge_models"]

    first, again = define(1), define(2)
    identities = [Algorithm.from_function(f).identity for f in (first, again, first)]
    assert identities == ["notebook.merge_models()", "notebook.merge_models#1()", identities[0]]
    del first
    assert Algorithm.from_function(define(3)).identity == "notebook.merge_models#2()"


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.5, [0.5, 0.5]), ((1, 2), [1, 2]), ({"b": 1, "a": 2}, [2, 1]), (np.float32(2), [2, 2])],
)
def test_per_expert_values_arrive_in_slot_order(value, expected):
    algorithm = Algorithm.from_function(scaled, weight=value)
    np.testing.assert_array_equal(algorithm.hyperparameter_arrays(("a", "b"))["weight"], expected)


@pytest.mark.parametrize(
    ("value", "message"),
    [((1, 2, 3), "3 values for 2 experts"), ({"a": 1, "c": 2}, "names a, c; the experts are a, b")],
)
def test_per_expert_values_that_do_not_match_the_experts(value, message):
    with pytest.raises(UserError, match=message):
        Algorithm.from_function(scaled, weight=value).hyperparameter_arrays(("a", "b"))


@pytest.mark.parametrize(
    ("hyperparameters", "message"),
    [
        (
            {"scal": 1.0},
            "no hyperparameter 'scal'; did you mean scale\\? available: weight, scale, fair",
        ),
        ({"scale": "much"}, "'scale' must be a finite number, not 'much'"),
        ({"scale": float("nan")}, "'scale' must be a finite number"),
        ({"scale": True}, "'scale' must be a finite number"),
        ({"weight": "abc"}, "'weight' must be a finite number, a list"),
        ({"fair": 1}, "'fair' must be true or false"),
    ],
)
def test_invalid_hyperparameters_raise_user_error(hyperparameters, message):
    with pytest.raises(UserError, match=message):
        Algorithm.from_function(scaled, **hyperparameters)
    with pytest.raises(UserError, match=message):
        Algorithm.from_function(scaled).bind(**hyperparameters)


def test_invalid_signatures_raise_user_error():
    def no_default(task_vectors, ratio):
        return ratio

    def variadic(task_vectors, **rest):
        return rest

    def bare_float(task_vectors, ratio=0.5):
        return ratio

    def unsupported_annotation(task_vectors, ratio: list = ()):
        return ratio

    def nothing():
        return jnp.zeros(())

    for function, message in [
        (no_default, "'ratio' is not an input"),
        (variadic, "'rest' must be an ordinary"),
        (bare_float, "annotate hyperparameter 'ratio'"),
        (unsupported_annotation, "'ratio' must be annotated"),
        (nothing, "first parameter must be task_vectors"),
    ]:
        with pytest.raises(UserError, match=message):
            Algorithm.from_function(function)
