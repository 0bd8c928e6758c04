import jax
import numpy as np
import pytest

from sdjax.algorithms.registry import algorithm, algorithms, methods
from sdjax.errors import UserError

NAMES = [
    "linear",
    "task_arithmetic",
    "ties",
    "dare_linear",
    "dare_ties",
    "slerp",
    "model_stock",
    "magmax",
    "self_developing_a",
]


def test_methods_describe_every_algorithm():
    assert list(algorithms()) == list(methods()) == NAMES
    ties = methods()["ties"]
    assert ties.title.startswith("TIES: ")
    assert {p.name: p.default for p in ties.parameters} == {
        "weight": 1.0,
        "density": 0.2,
        "scale": 1.0,
        "normalize": True,
        "elect": "weighted",
    }
    assert [p.type for p in ties.parameters][:2] == ["number, or one for each expert"] * 2
    for method in methods().values():
        assert method.mathematics.startswith("τ")
        assert "\n" not in method.mathematics


def test_algorithms_are_distinct_and_traceable_for_any_number_of_dimensions():
    identities = {algorithm(name).identity for name in NAMES}
    assert len(identities) == len(NAMES)
    for name in NAMES:
        bound = algorithm(name)
        for shape in [(7,), (4, 6), (2, 3, 4)]:
            vectors = tuple(jax.ShapeDtypeStruct(shape, np.float32) for _ in range(3))
            slots = ("a", "b", "c")

            def run(vectors, arguments, bound=bound, slots=slots):
                return bound.call(slots, vectors, arguments, {"key": jax.random.key(0)})

            out = jax.eval_shape(run, vectors, bound.arguments(slots))
            assert (out.shape, out.dtype) == (shape, np.float32)


def test_an_unknown_method_is_named():
    with pytest.raises(UserError, match="no merge method 'tie'; there are: linear"):
        algorithm("tie")
