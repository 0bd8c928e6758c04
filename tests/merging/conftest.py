"""Small trees of weights for the merging tests."""

import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.merging.model_tree import ModelTree
from sdjax.merging.statistics import statistic_name
from sdjax.testing import count_compilations

SHAPES = {"gate_proj": (6, 4), "up_proj": (6, 4), "down_proj": (4, 6)}


def build_tree(seed, layers=3, dtype=jnp.float32, near=None, scale=1.0):
    """Return a tree of random weights, or `near` plus noise of size `scale`."""
    rng = np.random.default_rng(seed)
    tree = {"embed": jnp.asarray(rng.standard_normal((5, 4)), dtype), "layers": {}}
    for layer in range(layers):
        mlp = {}
        for name, shape in SHAPES.items():
            value = scale * rng.standard_normal(shape)
            if near is not None:
                value += np.asarray(near["layers"][str(layer)]["mlp"][name], np.float64)
            mlp[name] = jnp.asarray(value, dtype)
        tree["layers"][str(layer)] = {
            "mlp": mlp,
            "attn": {"q_proj": jnp.asarray(rng.standard_normal((4, 4)), dtype)},
        }
    return tree


@pytest.fixture(name="make_tree")
def make_tree_fixture():
    return build_tree


@pytest.fixture
def make_stats():
    """Return a function that makes up statistics of a model: a mapping from name to array."""

    def build(tree, seed=0):
        rng, stats = np.random.default_rng(seed), {}
        for name, tensor in ModelTree.of(tree, "a model").by_name.items():
            stats[statistic_name("fisher", name)] = rng.random(tensor.shape).astype(np.float32)
            if tensor.ndim == 2:
                x = rng.standard_normal((9, tensor.shape[1]))
                stats[statistic_name("gram", name)] = (x.T @ x / 9).astype(np.float32)
        return stats

    return build


@pytest.fixture
def compilations():
    """Count the executables that XLA compiles during the test."""
    with count_compilations() as counter:
        yield counter


@pytest.fixture
def base():
    return build_tree(0)


@pytest.fixture
def experts(base):
    return [build_tree(seed, near=base, scale=0.1 * seed) for seed in (1, 2, 3)]
