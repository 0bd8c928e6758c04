"""Sparsification of task vectors: trimming by magnitude, and dropping at random.

Trimming is shared by TIES and Breadcrumbs. Random dropping is shared by DARE (the same probability
for every element) and DELLA (a probability that grows with the rank of the magnitude).

Axes: *shape (the shape of the tensor).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Key

from sdjax.merging.algorithm import PerExpert, TaskVectors
from sdjax.merging.operations.mixing import keep_and_rescale
from sdjax.merging.operations.random import bernoulli, uniform
from sdjax.merging.operations.ranks import outranks, rank_fraction
from sdjax.merging.operations.topk_threshold import magnitude_band_masks, topk_masks


def trim(
    vectors: TaskVectors, density: PerExpert, rescale: str, keep_ties: bool = False
) -> TaskVectors:
    """Keep the elements of largest magnitude, a fraction `density` of each tensor.

    With `keep_ties`, elements that tie with the smallest one kept are kept too.
    """
    fractions = [density[name] for name in vectors]
    masks = topk_masks(list(vectors.values()), fractions, keep_ties=keep_ties)
    return keep_and_rescale(vectors, dict(zip(vectors, masks, strict=True)), density, rescale)


def trim_both_ends(
    vectors: TaskVectors,
    density: PerExpert,
    gamma: PerExpert,
    rescale: str,
    keep_ties: bool = False,
) -> TaskVectors:
    """Drop the fraction `gamma` of largest elements and keep the fraction `density` below them.

    With `keep_ties`, elements that tie with the last one dropped or kept are treated like it.
    """
    fractions = ([fraction[name] for name in vectors] for fraction in (density, gamma))
    masks = magnitude_band_masks(list(vectors.values()), *fractions, keep_ties=keep_ties)
    return keep_and_rescale(vectors, dict(zip(vectors, masks, strict=True)), density, rescale)


def random_drop(
    vectors: TaskVectors, key: Key[Array, ""], density: PerExpert, rescale: str
) -> TaskVectors:
    """Keep each element with probability `density`, independently for each expert, and rescale."""
    masks = {
        name: bernoulli(key, density[name], vector.shape, stream)
        for stream, (name, vector) in enumerate(vectors.items())
    }
    return keep_and_rescale(vectors, masks, density, rescale)


def random_drop_by_rank(
    vectors: TaskVectors,
    key: Key[Array, ""],
    density: PerExpert,
    epsilon: PerExpert,
    rescale: str,
) -> TaskVectors:
    """Keep each element with a probability that grows with its rank in its row, and rescale.

    The probability is linear in the rank, from density - epsilon (smallest magnitude of the row) to
    density + epsilon (largest), clipped to [0, 1]. A density of one or more keeps everything; zero
    or less keeps nothing.
    """
    masks: dict[str, jax.Array] = {}
    kept: dict[str, jax.Array] = {}
    for stream, (name, vector) in enumerate(vectors.items()):
        low, width = density[name] - epsilon[name], 2 * epsilon[name]
        # An element is kept if its draw is below low + width * (its rank fraction). Solved for the
        # rank fraction, this needs no rank: each element has a fraction that it must exceed.
        draw = uniform(key, vector.shape, stream)
        threshold = jnp.where(width > 0, (draw - low) / jnp.where(width > 0, width, 1.0), jnp.inf)
        threshold = jnp.where((width <= 0) & (draw < low), -1.0, threshold)
        masks[name] = (outranks(vector, threshold) | (density[name] >= 1)) & (density[name] > 0)
        if rescale == "density":
            probability = jnp.clip(low + width * rank_fraction(vector), 0.0, 1.0)
            kept[name] = jnp.where(density[name] >= 1, 1.0, probability)
    return keep_and_rescale(vectors, masks, kept, rescale)
