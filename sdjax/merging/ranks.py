"""Ranks of magnitude within a row, from one sort of the values.

A rank by two argsorts carries indices through both. Here a row is sorted once, as integers and
without indices, and an element is compared with the value that stands at the place in question.

Axes: n the last axis (the row), over which ranks are taken; a vector is one row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def outranks(x: jax.Array, share: jax.Array) -> jax.Array:
    """Boolean of x's shape: whether an element's rank share in its row is above ``share``.

    x: float32 [..., n]. share: float32 of the same shape. An element's rank share is that of
    ``rank_share``; equal magnitudes count as the highest of their ranks.
    """
    if not x.ndim:  # a number is a row of one
        return outranks(x[None], share[None])[0]
    bits, ordered = _bits(x), _ordered(x)
    count = x.shape[-1]
    place = jnp.floor(jnp.clip(share, -1.0, 2.0) * max(count - 1, 1)).astype(jnp.int32) + 1
    standing = jnp.take_along_axis(ordered, jnp.clip(place, 0, count - 1), axis=-1)
    return (place <= 0) | ((place < count) & (bits >= standing))


def rank_fraction(x: jax.Array) -> jax.Array:
    """float32 [..., n]: rank / (n - 1) of each magnitude in its row, 0 the smallest, 1 the largest.

    Equal magnitudes share the highest of their ranks.
    """
    if not x.ndim:
        return rank_fraction(x[None])[0]
    bits, ordered = _bits(x), _ordered(x)
    count = x.shape[-1]

    # Binary search, all elements at once: how many of the row are not above this one.
    def narrow(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = (low + high) // 2
        at = jnp.take_along_axis(ordered, jnp.minimum(middle, count - 1), axis=-1)
        above = (at > bits) | (middle >= count)
        return jnp.where(above, low, middle + 1), jnp.where(above, middle, high)

    start = (jnp.zeros(x.shape, jnp.int32), jnp.full(x.shape, count, jnp.int32))
    low, _ = jax.lax.fori_loop(0, count.bit_length(), narrow, start)
    return (low - 1).astype(jnp.float32) / max(count - 1, 1)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _ordered(x: jax.Array) -> jax.Array:
    return jnp.sort(_bits(x), axis=-1)
