"""Ranks of magnitudes within a row, from one sort of the values.

Ranking by two argsorts carries indices through both. Here a row is sorted once, as integers and
without indices, and each element is compared with the value at the rank in question.

Axes: n (the last axis, over which ranks are taken; a vector is a single row).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32


def outranks(x: Float[Array, "*rows"], fraction: Float32[Array, "*rows"]) -> Bool[Array, "*rows"]:
    """Return a mask of the elements whose rank fraction exceeds `fraction`.

    Args:
        x: elements, ranked by magnitude within the last axis as in `rank_fraction`.
        fraction: the rank fraction to exceed, per element.
    """
    if not x.ndim:  # a scalar is a row of one element
        return outranks(x[None], fraction[None])[0]
    bits, ordered = _magnitude_bits(x), _sorted_magnitude_bits(x)
    count = x.shape[-1]
    rank = jnp.floor(jnp.clip(fraction, -1.0, 2.0) * max(count - 1, 1)).astype(jnp.int32) + 1
    at_rank = jnp.take_along_axis(ordered, jnp.clip(rank, 0, count - 1), axis=-1)
    return (rank <= 0) | ((rank < count) & (bits >= at_rank))


def rank_fraction(x: Float[Array, "*rows"]) -> Float32[Array, "*rows"]:
    """Return rank / (n - 1) of each magnitude in its row: 0 for the smallest, 1 for the largest.

    Equal magnitudes share the highest of their ranks.
    """
    if not x.ndim:
        return rank_fraction(x[None])[0]
    bits, ordered = _magnitude_bits(x), _sorted_magnitude_bits(x)
    count = x.shape[-1]

    # Binary search for all elements at once: count the elements of the row that are not larger.
    def bisect(_: jax.Array, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        at_middle = jnp.take_along_axis(ordered, jnp.minimum(middle, count - 1), axis=-1)
        larger = (at_middle > bits) | (middle >= count)
        return jnp.where(larger, low, middle + 1), jnp.where(larger, middle, high)

    start = (jnp.zeros(x.shape, jnp.int32), jnp.full(x.shape, count, jnp.int32))
    low, _ = jax.lax.fori_loop(0, count.bit_length(), bisect, start)
    return (low - 1).astype(jnp.float32) / max(count - 1, 1)


def _magnitude_bits(x: Float[Array, "*rows"]) -> Int32[Array, "*rows"]:
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _sorted_magnitude_bits(x: Float[Array, "*rows"]) -> Int32[Array, "*rows"]:
    return jnp.sort(_magnitude_bits(x), axis=-1)
