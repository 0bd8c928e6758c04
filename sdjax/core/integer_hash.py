"""Elementwise 32-bit hashing of arrays, for random masks and for fingerprints.

The mixer is the finalizer "lowbias32" (Chris Wellons, "Prospecting for Hash Functions", 2018).

Axes: *shape (the shape of the tensor).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt32


def flat_index(shape: tuple[int, ...], zero: UInt32[Array, ""] | int = 0) -> UInt32[Array, "*_"]:
    """Return each element's row-major index, computed from one iota per axis without a reshape.

    Args:
        shape: shape of the tensor.
        zero: zero. If it depends on the state of a loop, XLA recomputes the index in every pass,
            which is faster than to store it before the loop.
    """
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * (jnp.uint32(stride) + zero)
    return index


def mix(x: UInt32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Return a bijective hash of each element."""
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
