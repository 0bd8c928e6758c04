"""Exact fingerprint of parameters: equal arrays have equal fingerprints on any mesh.

Each element's bits are hashed together with its position; the hashes are summed modulo 2^32, which
is exact in any order. Two sums per tensor give 64 bits, and each is one pass over the tensor on its
own devices.

Axes: *shape (the shape of a tensor).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jaxtyping import Array, Shaped, UInt32

from sdjax.core.integer_hash import flat_index, mix
from sdjax.models.tree import flatten
from sdjax.sharding.rules import replicated

_SALTS = (0x9E3779B9, 0x85EBCA6B)
_DIGITS = 16


def fingerprint(params: Mapping[str, Any]) -> str:
    """Return a hexadecimal digest of the paths, shapes, dtypes and bits of parameters.

    With several processes, all of them must call this.

    Args:
        params: nested dict of arrays.

    Examples:
        >>> import sdjax
        >>> _, params = sdjax.load_model("zoo:seed")
        >>> fingerprint(params) == fingerprint(sdjax.load_model("zoo:seed")[1])
        True
    """
    leaves = flatten(params)
    sums = jax.device_get({path: _compiled(replicated(x))(x) for path, x in leaves.items()})
    digest = hashlib.sha256()
    for path, x in leaves.items():
        digest.update(repr((path, x.shape, np.dtype(x.dtype).name, sums[path].tolist())).encode())
    return digest.hexdigest()[:_DIGITS]


def text_fingerprint(*parts: object) -> str:
    """Return a hexadecimal digest of texts, numbers and tuples of them, by their `repr`."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:_DIGITS]


@functools.cache
def _compiled(sharding: NamedSharding | None) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(_hash_sums, out_shardings=sharding)


def _hash_sums(x: Shaped[Array, "*shape"]) -> UInt32[Array, "2"]:
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    if x.dtype.itemsize == 8:  # two words per element, on a new last axis
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32)
    else:
        bits = jax.lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}").astype(jnp.uint32)
    index = flat_index(bits.shape)
    return jnp.stack(
        [jnp.sum(mix(bits ^ mix(index ^ jnp.uint32(salt))), dtype=jnp.uint32) for salt in _SALTS]
    )
