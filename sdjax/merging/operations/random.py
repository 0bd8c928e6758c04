"""Random numbers as a pure function of (key, stream, position in the tensor).

On a CPU `jax.random.bernoulli` draws about 26 million numbers per second. Here every element hashes
its own flat index with the key: this is elementwise, so it fuses with the surrounding arithmetic,
needs no communication under any sharding, and is independent of order and of the number of devices.

The mixer of `sdjax.core.integer_hash` is applied twice with different words of the key.

Axes: *shape (the shape of the tensor).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32, Key, UInt32

from sdjax.core.integer_hash import flat_index, mix


def bits(key: Key[Array, ""], shape: tuple[int, ...], stream: int = 0) -> UInt32[Array, "*shape"]:
    """Draw 32 random bits per element.

    Args:
        key: typed PRNG key.
        shape: shape of the result; at most 2^32 elements.
        stream: different numbers give independent draws from one key (for example the expert's
            index).
    """
    words = jax.random.key_data(key).reshape(-1).astype(jnp.uint32)
    first = jnp.uint32(stream) * jnp.uint32(0x9E3779B9)
    for i in range(words.shape[0]):
        first = mix(first ^ words[i])
    second = mix(first + jnp.uint32(0x85EBCA6B))
    return mix(mix(flat_index(shape) ^ first) + second)


def uniform(
    key: Key[Array, ""], shape: tuple[int, ...], stream: int = 0
) -> Float32[Array, "*shape"]:
    """Draw from [0, 1) in multiples of 2^-24; arguments as in `bits`."""
    return (bits(key, shape, stream) >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def bernoulli(
    key: Key[Array, ""],
    probability: Float32[Array, ""] | float,
    shape: tuple[int, ...],
    stream: int = 0,
) -> Bool[Array, "*shape"]:
    """Draw booleans that are true with `probability`: never for 0, always for 1."""
    return uniform(key, shape, stream) < probability
