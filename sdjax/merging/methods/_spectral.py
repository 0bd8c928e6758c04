"""Polar factors, shared by the methods on singular vectors."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def nearest_orthonormal(matrix: jax.Array) -> jax.Array:
    """U Vᵀ of the matrix's singular value decomposition, of the matrix's shape."""
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u @ vt
