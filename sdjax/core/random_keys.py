"""Random keys derived from names, so that each purpose has its own stream."""

from __future__ import annotations

import hashlib

import jax


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """Return `key` with the full text of `name` folded in.

    The first four bytes of the name's SHA-256 are folded in, so that names with a common prefix
    give independent keys. Two names share a key with probability 2**-32, which is negligible for
    the few purposes of a program. The result is the same in every process and version of Python.

    Args:
        key: typed PRNG key, such as `jax.random.key(0)`.
        name: purpose of the new key, such as "generation" or "adapter".

    Examples:
        >>> key = jax.random.key(0)
        >>> bool(fold_in_name(key, "adapter") == fold_in_name(key, "data"))
        False
    """
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))
