"""Random keys derived from names, so that independent purposes never share a stream."""

from __future__ import annotations

import hashlib

import jax


def fold_in_name(key: jax.Array, name: str) -> jax.Array:
    """Return `key` with the full text of `name` folded in.

    The first four bytes of the name's SHA-256 are folded in, so that names with a common prefix
    give independent keys. The result is the same in every process and version of Python.

    Args:
        key: typed PRNG key, such as `jax.random.key(0)`.
        name: purpose of the new key, such as "generation" or "layers/0/mlp/up_proj".

    Examples:
        >>> key = jax.random.key(0)
        >>> bool(fold_in_name(key, "dropout_a") == fold_in_name(key, "dropout_b"))
        False
    """
    digest = hashlib.sha256(name.encode()).digest()
    return jax.random.fold_in(key, int.from_bytes(digest[:4], "big"))
