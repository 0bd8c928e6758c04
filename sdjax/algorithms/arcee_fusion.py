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
    importance = reproducible_sum([jnp.abs(vector) * _divergence(base, vector, row)])
    size = importance.size
    places = [size - int(q * (size - 1)) for q in (0.25, 0.5, 0.75)]
    first, median, third = kth_magnitudes(importance, jnp.array(places))
    return jnp.where(importance >= median + 1.5 * (third - first), vector, 0.0)


def _divergence(base: jax.Array, vector: jax.Array, row: int | tuple[()]) -> jax.Array:
    """KL(p || q) of each row, p = softmax(base + vector) + 1e-8 and q = softmax(base) + 1e-8.

    The terms p log(p / q) of a small change cancel to its square, of which float32 would leave two
    digits. As p and q have one sum, it is that of q ((1 + r) log(1 + r) - r) with r = p / q - 1, no
    term of which is negative; r is found without a difference of like numbers.
    """
    share = jax.nn.softmax(base, axis=row)
    grown = jnp.sum(share * jnp.expm1(vector), axis=row, keepdims=True)
    q = share + 1e-8
    r = share / q * jnp.expm1(vector - jnp.log1p(grown))
    near = jnp.clip(r, -0.1, 0.1)
    series = near**2 * jnp.polyval(
        jnp.array([(-1) ** k / (k * (k - 1)) for k in range(9, 1, -1)], jnp.float32), near
    )
    far = jax.scipy.special.xlog1py(1 + r, r) - r
    return jnp.sum(q * jnp.where(r == near, series, far), axis=row, keepdims=True)
