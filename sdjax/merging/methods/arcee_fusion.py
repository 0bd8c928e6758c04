"""Arcee Fusion: take the elements of one expert whose change matters most.

Arcee AI's method, as implemented in mergekit; no paper. The importance of an element is the size of
its change times the divergence KL(softmax(expert row) || softmax(base row)) of its row; elements at
or above median + 1.5 (third quartile - first quartile) are taken. The selection matches float64
arithmetic: mergekit's divergence cancels in float32 for small changes, and for tensors of more than
a million elements its quartiles are those of a random sample.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.topk_threshold import kth_largest_magnitudes
from sdjax.xla.reductions import reproducible_sum

FORMULA = "τ = τ_1 where i ≥ q_2 + 1.5 (q_3 - q_1), i = |τ_1| · KL of the rows' softmax"
RECIPE = RecipeSchema(min_models=1, max_models=1)

_SERIES_LIMIT = 0.25  # the series are accurate in float32 up to this value
# Coefficients of (e^x - 1) / x and ((1 + r) log(1 + r) - r) / r^2, highest power first.
_EXPM1 = np.array([1 / math.factorial(k) for k in range(8, 0, -1)], np.float32)
_KL = np.array([(-1) ** k / (k * (k - 1)) for k in range(12, 1, -1)], np.float32)


def merge_models(task_vectors: TaskVectors, base: Tensor) -> Tensor:
    """Return the task vector's most important elements."""
    if len(task_vectors) != 1:
        raise ValueError("takes exactly one expert")
    (vector,) = task_vectors.values()
    row = -1 if vector.ndim else ()
    importance = reproducible_sum([jnp.abs(vector) * _divergence(base, vector, row)])
    size = importance.size
    ranks = [size - int(q * (size - 1)) for q in (0.25, 0.5, 0.75)]
    first, median, third = kth_largest_magnitudes(importance, jnp.array(ranks))
    return jnp.where(importance >= median + 1.5 * (third - first), vector, 0.0)


def _divergence(base: Tensor, vector: Tensor, row: int | tuple[()]) -> jax.Array:
    """Return KL(p || q) per row, p = softmax(base + vector) + 1e-8 and q = softmax(base) + 1e-8.

    For a small change the terms p log(p / q) cancel down to its square, and float32 would retain
    only two digits. Since p and q have the same sum, the divergence is the sum of
    q ((1 + r) log(1 + r) - r) with r = p / q - 1, which has no negative terms; computing r
    involves no cancellation.
    """
    probs = jax.nn.softmax(base, axis=row)
    growth = _expm1(vector)
    mean = jnp.sum(probs * growth, axis=row, keepdims=True)
    q = probs + 1e-8
    r = probs / q * (growth - mean) / (1 + mean)
    near = jnp.clip(r, -_SERIES_LIMIT, _SERIES_LIMIT)
    far = (1 + r) * jnp.log(1 + r) - r
    divergence = jnp.where(r == near, near**2 * jnp.polyval(_KL, near), far)
    return jnp.sum(q * divergence, axis=row, keepdims=True)


def _expm1(x: Tensor) -> Tensor:
    # XLA's expm1 computes both a hyperbolic tangent and an exponential.
    near = jnp.clip(x, -_SERIES_LIMIT, _SERIES_LIMIT)
    return jnp.where(x == near, near * jnp.polyval(_EXPM1, near), jnp.exp(x) - 1)
