"""Arcee Fusion: take over the elements of one expert whose change matters most.

Arcee AI's method as mergekit has it; no paper. An element's importance is the size of its change
times the divergence KL(softmax(expert row) || softmax(base row)) of its row; the elements at or
above median + 1.5 (third - first quartile) are taken. The quartiles are exact; mergekit estimates
them on a million random elements where a tensor has more.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.magnitude import kth_magnitudes
from sdjax.merging.method import Meaning
from sdjax.merging.sums import reproducible_sum

MATHEMATICS = "τ = τ_1 where i ≥ q_2 + 1.5 (q_3 - q_1), i = |τ_1| · KL of the rows' softmax"
MEANING = Meaning(fewest=1, most=1)


def merge_models(task_vectors: dict[str, jax.Array], base: jax.Array) -> jax.Array:
    if len(task_vectors) != 1:
        raise ValueError("arcee_fusion takes exactly one expert")
    (vector,) = task_vectors.values()
    row = -1 if vector.ndim else ()
    p = jax.nn.softmax(base + vector, axis=row) + 1e-8
    q = jax.nn.softmax(base, axis=row) + 1e-8
    divergence = jnp.sum(p * jnp.log(p / q), axis=row, keepdims=True)
    # A divergence is not negative but for rounding, and its quartiles are then those of a size.
    importance = reproducible_sum([jnp.abs(vector) * jnp.maximum(divergence, 0.0)])
    size = importance.size
    places = [size - int(q * (size - 1)) for q in (0.25, 0.5, 0.75)]
    first, median, third = kth_magnitudes(importance, jnp.array(places))
    return jnp.where(importance >= median + 1.5 * (third - first), vector, 0.0)
