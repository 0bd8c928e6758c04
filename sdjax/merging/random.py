"""Random masks as a pure function of (key, stream, place in the tensor).

`jax.random.bernoulli` makes some 26 million draws a second on a CPU. Here every element hashes its
own flat index with the key: elementwise, so it fuses with the arithmetic around it, needs no
communication under any sharding, and is the same in any order and on any number of devices.

The mixer is the 32-bit finaliser "lowbias32" (Chris Wellons, "Prospecting for Hash Functions",
2018), applied twice with different words of the key.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp


def bits(key: jax.Array, shape: tuple[int, ...], stream: int = 0) -> jax.Array:
    """uint32 of ``shape``: 32 random bits an element; at most 2^32 elements.

    key: typed PRNG key. stream: distinct numbers give independent draws from one key, such as the
    expert's place.
    """
    words = jax.random.key_data(key).reshape(-1).astype(jnp.uint32)
    first = jnp.uint32(stream) * jnp.uint32(0x9E3779B9)
    for i in range(words.shape[0]):
        first = _mix(first ^ words[i])
    second = _mix(first + jnp.uint32(0x85EBCA6B))
    return _mix(_mix(_flat_index(shape) ^ first) + second)


def uniform(key: jax.Array, shape: tuple[int, ...], stream: int = 0) -> jax.Array:
    """float32 of ``shape`` in [0, 1), multiples of 2^-24."""
    return (bits(key, shape, stream) >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def bernoulli(
    key: jax.Array, probability: jax.Array | float, shape: tuple[int, ...], stream: int = 0
) -> jax.Array:
    """Boolean of ``shape``, true with ``probability``: never at 0, always at 1."""
    return uniform(key, shape, stream) < probability


def _flat_index(shape: tuple[int, ...]) -> jax.Array:
    """uint32: each element's place in row-major order, from one iota an axis (no reshape)."""
    index = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        stride = math.prod(shape[axis + 1 :]) % 2**32
        index += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * jnp.uint32(stride)
    return index


def _mix(x: jax.Array) -> jax.Array:
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return x ^ (x >> 16)
