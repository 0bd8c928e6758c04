"""Lengths and angles of task vectors, shared by the methods on spheres.

These methods return a weighted sum of what they are given, whose weights follow from the inner
products alone. So the tensors are read once for the products and once for the sum, whatever
happens between, and on a mesh only scalars travel.

Axes: k, l experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sdjax.merging.reductions import sums


def gram(vectors: Sequence[jax.Array]) -> jax.Array:
    """float32 [k, l]: the inner products of the flattened vectors."""
    count = len(vectors)
    pairs = list(itertools.combinations_with_replacement(range(count), 2))
    products = dict(zip(pairs, sums([vectors[i] * vectors[j] for i, j in pairs]), strict=True))
    return jnp.stack(
        [
            jnp.stack([products[min(i, j), max(i, j)] for j in range(count)])  # [l]
            for i in range(count)
        ]
    )


def linear_combination(weights: jax.Array, vectors: Sequence[jax.Array]) -> jax.Array:
    """The sum of weights[k] * vectors[k]."""
    return jnp.asarray(sum(weights[i] * vector for i, vector in enumerate(vectors)))


def slerp_weights(
    cosine: jax.Array, t: jax.Array, linear: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Shares of the two ends at place ``t`` of the arc between them; a line where ``linear``."""
    angle = jnp.arccos(jnp.where(linear, 0.0, cosine))
    sine = jnp.sin(angle)
    return (
        jnp.where(linear, 1.0 - t, jnp.sin((1.0 - t) * angle) / sine),
        jnp.where(linear, t, jnp.sin(t * angle) / sine),
    )
