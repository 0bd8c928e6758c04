"""Arcee Fusion: take over the elements of one expert whose change matters most.

Arcee AI's method as mergekit has it; no paper. An element's importance is the size of its change
times the divergence KL(softmax(expert row) || softmax(base row)) of its row; the elements at or
above median + 1.5 (third - first quartile) are taken. These are the elements that float64 takes:
mergekit's divergence cancels in float32 where a change is small, and its quartiles are those of a
million random elements where a tensor has more.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.merging.method import RecipeSchema
from sdjax.merging.reductions import reproducible_sum
from sdjax.merging.topk_threshold import kth_largest_magnitudes

FORMULA = "τ = τ_1 where i ≥ q_2 + 1.5 (q_3 - q_1), i = |τ_1| · KL of the rows' softmax"
RECIPE = RecipeSchema(min_models=1, max_models=1)

NEAR = 0.25  # up to which the series have float32's precision
# (e^x - 1) / x and ((1 + r) log(1 + r) - r) / r^2, the highest power first
_EXPM1 = np.array([1 / math.factorial(k) for k in range(8, 0, -1)], np.float32)
_KL = np.array([(-1) ** k / (k * (k - 1)) for k in range(12, 1, -1)], np.float32)


def merge_models(task_vectors: dict[str, jax.Array], base: jax.Array) -> jax.Array:
    if len(task_vectors) != 1:
        raise ValueError("arcee_fusion takes exactly one expert")
    (vector,) = task_vectors.values()
    row = -1 if vector.ndim else ()
    importance = reproducible_sum([jnp.abs(vector) * _divergence(base, vector, row)])
    size = importance.size
    places = [size - int(q * (size - 1)) for q in (0.25, 0.5, 0.75)]
    first, median, third = kth_largest_magnitudes(importance, jnp.array(places))
    return jnp.where(importance >= median + 1.5 * (third - first), vector, 0.0)


def _divergence(base: jax.Array, vector: jax.Array, row: int | tuple[()]) -> jax.Array:
    """KL(p || q) of each row, p = softmax(base + vector) + 1e-8 and q = softmax(base) + 1e-8.

    The terms p log(p / q) of a small change cancel to its square, of which float32 would leave two
    digits. As p and q have one sum, it is that of q ((1 + r) log(1 + r) - r) with r = p / q - 1, no
    term of which is negative; r is found without a difference of like numbers.
    """
    share = jax.nn.softmax(base, axis=row)
    grown = _expm1(vector)
    mean = jnp.sum(share * grown, axis=row, keepdims=True)
    q = share + 1e-8
    r = share / q * (grown - mean) / (1 + mean)
    near = jnp.clip(r, -NEAR, NEAR)
    far = (1 + r) * jnp.log(1 + r) - r
    divergence = jnp.where(r == near, near**2 * jnp.polyval(_KL, near), far)
    return jnp.sum(q * divergence, axis=row, keepdims=True)


def _expm1(x: jax.Array) -> jax.Array:
    # XLA's own computes a hyperbolic tangent and an exponential.
    near = jnp.clip(x, -NEAR, NEAR)
    return jnp.where(x == near, near * jnp.polyval(_EXPM1, near), jnp.exp(x) - 1)
