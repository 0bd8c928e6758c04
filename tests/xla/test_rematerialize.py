"""Rematerialized loops: bit-identical results, and no stored value the size of a tensor."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.merging.operations.topk_threshold import (
    kth_largest_magnitudes,
    magnitude_band_masks,
    topk_masks,
)
from sdjax.merging.tensor_program import task_vectors
from sdjax.xla.rematerialize import rematerialize

SHAPE = (512, 384)


def weights(dtype):
    rng = np.random.default_rng(0)
    base, *noise = (rng.standard_normal(SHAPE).astype(np.float32) for _ in range(4))
    return jnp.asarray(base, dtype), tuple(jnp.asarray(base + 0.1 * n, dtype) for n in noise)


def kept(base, experts):
    vectors = task_vectors(base, experts)
    masks = topk_masks(vectors, [0.2, 0.3, 0.4])
    return sum(jnp.where(mask, v, 0.0) for mask, v in zip(masks, vectors, strict=True))


def middle(base, experts):
    vectors = task_vectors(base, experts)
    return jnp.stack(magnitude_band_masks(vectors, [0.2] * 3, [0.01] * 3))


def of_products(base, experts):
    return kth_largest_magnitudes(experts[0] * experts[1], jnp.array([10, 1000]))


def looped(base, experts):
    """Run a loop whose carry contains its input and a counter."""
    start = task_vectors(base, experts)[0]
    return jax.lax.while_loop(
        lambda state: state[1] < 3, lambda state: (state[0] * 0.5 + base, state[1] + 1), (start, 0)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("function", [kept, middle, of_products, looped])
def test_results_are_bit_identical(function, dtype):
    arguments = weights(dtype)
    plain, recomputed = jax.jit(function)(*arguments), jax.jit(rematerialize(function))(*arguments)
    jax.tree.map(np.testing.assert_array_equal, plain, recomputed)


def test_selection_stores_no_task_vector():
    def stored(function):
        compiled = jax.jit(function).lower(*weights("bfloat16")).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    vector = 4 * np.prod(SHAPE)
    assert stored(kept) > 2 * vector
    assert stored(rematerialize(kept)) < 0.2 * vector


def test_function_without_loop_is_unchanged():
    def plain(base, experts):
        return task_vectors(base, experts)[0][::2]

    texts = [
        jax.jit(f).lower(*weights("bfloat16")).as_text() for f in (plain, rematerialize(plain))
    ]
    assert texts[0].replace("jit_plain", "") == texts[1].replace("jit_rematerialized", "")
