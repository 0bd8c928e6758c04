"""Helpers for method tests: task vectors, merging a single tensor, comparisons."""

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.engine import merge
from sdjax.merging.methods.registry import algorithm
from sdjax.merging.tensor_program import tensor_key_data

PATH = "layers/0/mlp/up_proj"
SHAPE = (40, 30)
KEY = jax.random.key(5)


def vectors(count, seed=0):
    rng = np.random.default_rng(seed)
    common = rng.standard_normal(SHAPE)
    return [
        (0.3 * common + rng.standard_normal(SHAPE) * (1 + j)).astype(np.float32)
        for j in range(count)
    ]


def run(name, task_vectors, base=None, **hyperparameters):
    """Return the merged task vector of one tensor from the engine; the base is zero by default."""

    def tree(x):
        return {"layers": {"0": {"mlp": {"up_proj": jnp.asarray(x)}}}}

    base = np.zeros(task_vectors[0].shape, np.float32) if base is None else base
    merged = merge(
        tree(base),
        [tree(base + x) for x in task_vectors],
        algorithm(name, **hyperparameters),
        key=KEY,
        compile_cache=CompileCache(quick=True),
    )
    assert merged.finite
    new = np.asarray(merged.params["layers"]["0"]["mlp"]["up_proj"], np.float64)
    return new - np.asarray(base, np.float64)


def check(got, expected, rtol=1e-5):
    np.testing.assert_allclose(got, expected, rtol=rtol, atol=rtol * np.abs(expected).max())


def as_float64(task_vectors):
    return [np.asarray(x, np.float64) for x in task_vectors]


def leaf_key():
    """Return the key that the engine passes to a method for this tensor."""
    return jax.random.wrap_key_data(jnp.asarray(tensor_key_data(KEY, PATH)))
