"""Dropping at random, shared by DARE (every element alike) and DELLA (by rank of magnitude)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert
from sdjax.merging.methods._mixing import keep_and_rescale
from sdjax.merging.random import bernoulli, uniform
from sdjax.merging.ranks import outranks, rank_fraction

Vectors = dict[str, jax.Array]


def random_drop(vectors: Vectors, key: jax.Array, density: PerExpert, rescale: str) -> Vectors:
    """Keep each element with probability ``density`` of its expert, and rescale what is kept.

    The experts' masks are independent: an expert's place is its stream.
    """
    masks = {
        name: bernoulli(key, density[name], vector.shape, stream)
        for stream, (name, vector) in enumerate(vectors.items())
    }
    return keep_and_rescale(vectors, masks, density, rescale)


def random_drop_by_rank(
    vectors: Vectors, key: jax.Array, density: PerExpert, epsilon: PerExpert, rescale: str
) -> Vectors:
    """Keep an element with a probability that grows with its rank in its row, and rescale.

    The probability runs linearly from density - epsilon (the smallest magnitude of the row) to
    density + epsilon (the largest), cut to [0, 1]; a density of one or more keeps everything, one
    of zero or less nothing.
    """
    masks, share = {}, {}
    for stream, (name, vector) in enumerate(vectors.items()):
        low, width = density[name] - epsilon[name], 2 * epsilon[name]
        # An element is kept if its draw lies below low + width * (share of its row that it
        # outranks). Turned round, no rank is needed: each element has a share that it must outrank.
        draw = uniform(key, vector.shape, stream)
        needed = jnp.where(width > 0, (draw - low) / jnp.where(width > 0, width, 1.0), jnp.inf)
        needed = jnp.where((width <= 0) & (draw < low), -1.0, needed)
        masks[name] = (outranks(vector, needed) | (density[name] >= 1)) & (density[name] > 0)
        if rescale == "density":
            probability = jnp.clip(low + width * rank_fraction(vector), 0.0, 1.0)
            share[name] = jnp.where(density[name] >= 1, 1.0, probability)
    return keep_and_rescale(vectors, masks, share, rescale)
