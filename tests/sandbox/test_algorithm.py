"""Merge algorithms of verified programs."""

import jax.numpy as jnp
import numpy as np
import pytest
from catalogue import merge

from sdjax.core.errors import UserError
from sdjax.sandbox.algorithm import loop_limit_check, to_algorithm
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted

SLOTS = ("a", "b")
SIGNATURE = MergeSignature.of(SLOTS, {"x": ("x", (4, 3)), "y": ("y", (40,))})
# A loop at one of the two shapes; it ends at once, or never.
LOOP = """total = weight["a"] * task_vectors["a"] + weight["b"] * task_vectors["b"]
if total.ndim == 2:
    return total
return jax.lax.while_loop(lambda x: x[0] < 1.0, lambda x: x * 1.0, total)
"""


@pytest.fixture(scope="module")
def program():
    source = "from sdjax import PerExpert\n" + merge(LOOP, "task_vectors, weight: PerExpert = 0.5")
    return verify_ir(trace_trusted(source, SIGNATURE), SIGNATURE)


def call(algorithm, shape, value):
    vectors = [jnp.full(shape, value)] * 2
    return np.asarray(algorithm.call(SLOTS, vectors, algorithm.hyperparameter_arrays(SLOTS), {}))


def test_loop_limit_is_checked_at_the_shapes_that_have_loops(program):
    check = loop_limit_check(program, name="program")
    assert (call(check, (4, 3), 0.0) == 0).all()
    assert (call(check, (40,), 2.0) == 0).all()
    assert np.isnan(call(check, (40,), 0.0)).all()


def test_per_expert_is_bound_by_number_list_or_mapping(program):
    algorithm = to_algorithm(program, name="program")
    assert algorithm.hyperparameters == {"weight": (0.5, 0.5)}
    for value, expected in ((0.25, 0.5), ([0.5, 1.0], 1.5), ({"b": 3.0, "a": 0.0}, 3.0)):
        bound = algorithm.bind(weight=value)
        assert bound.identity == algorithm.identity
        assert (call(bound, (4, 3), 1.0) == expected).all()
    with pytest.raises(UserError, match="has 3 values for 2 experts"):
        algorithm.bind(weight=[1.0, 2.0, 3.0]).hyperparameter_arrays(SLOTS)
