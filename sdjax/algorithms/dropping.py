"""DARE's first half, shared by its two methods: drop elements at random and rescale the rest."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.random import bernoulli

RESCALE = ("density", "l1", "none")


def drop_and_rescale(
    vector: jax.Array, key: jax.Array, density: jax.Array, stream: int, rescale: str
) -> jax.Array:
    """Keep each element with probability ``density``, and rescale what is kept.

    stream: the expert's place, so that the experts' masks are independent. rescale: "density"
    divides by it (the paper; the expectation is kept), "l1" restores the sum of magnitudes
    (mergekit), "none" does nothing.
    """
    if rescale not in RESCALE:
        raise ValueError(f"rescale must be one of {', '.join(RESCALE)}, not {rescale!r}")
    kept = jnp.where(bernoulli(key, density, vector.shape, stream), vector, 0.0)
    if rescale == "density":
        return kept / jnp.where(density > 0, density, 1.0)
    if rescale == "l1":
        before, after = jnp.sum(jnp.abs(vector)), jnp.sum(jnp.abs(kept))
        return kept * jnp.where((before < 1e-7) | (after < 1e-7), 1.0, before / after)
    return kept
