"""Dropping at random, shared by DARE (every element alike) and DELLA (by rank of magnitude)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.algorithms.mixing import keep_and_rescale
from sdjax.merging.algorithm import PerExpert
from sdjax.merging.random import bernoulli, uniform
from sdjax.merging.ranks import outranks, rank_share

Vectors = dict[str, jax.Array]


def drop(vectors: Vectors, key: jax.Array, density: PerExpert, rescale: str) -> Vectors:
    """Keep each element with probability ``density`` of its expert, and rescale what is kept.

    The experts' masks are independent: an expert's place is its stream.
    """
    return {
        name: keep_and_rescale(
            vector, bernoulli(key, density[name], vector.shape, stream), density[name], rescale
        )
        for stream, (name, vector) in enumerate(vectors.items())
    }


def drop_by_rank(
    vectors: Vectors, key: jax.Array, density: PerExpert, epsilon: PerExpert, rescale: str
) -> Vectors:
    """Keep an element with a probability that grows with its rank in its row, and rescale.

    The probability runs linearly from density - epsilon (the smallest magnitude of the row) to
    density + epsilon (the largest), cut to [0, 1]; a density of one or more keeps everything, one
    of zero or less nothing.
    """
    return {
        name: _dropped(vector, key, density[name], epsilon[name], stream, rescale)
        for stream, (name, vector) in enumerate(vectors.items())
    }


def _dropped(
    vector: jax.Array,
    key: jax.Array,
    density: jax.Array,
    epsilon: jax.Array,
    stream: int,
    rescale: str,
) -> jax.Array:
    low, width = density - epsilon, 2 * epsilon
    # An element is kept if its draw lies below low + width * (share of its row that it outranks).
    # Turned round, no rank is needed: each element has a share that it must outrank.
    draw = uniform(key, vector.shape, stream)
    needed = jnp.where(width > 0, (draw - low) / jnp.where(width > 0, width, 1.0), jnp.inf)
    needed = jnp.where((width <= 0) & (draw < low), -1.0, needed)
    keep = (outranks(vector, needed) | (density >= 1)) & (density > 0)
    share = density
    if rescale == "density":
        share = jnp.where(density >= 1, 1.0, jnp.clip(low + width * rank_share(vector), 0.0, 1.0))
    return keep_and_rescale(vector, keep, share, rescale)
