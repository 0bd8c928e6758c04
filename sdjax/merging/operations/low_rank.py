"""Best approximations of matrices by low-rank factors.

Axes: out, in; rank; sketch (the rank and a few columns more).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32, Key

_OVERSAMPLING = 8
_POWER_ITERATIONS = 4


def low_rank_factors(
    matrix: Float32[Array, "out in"], rank: int, key: Key[Array, ""]
) -> tuple[Float32[Array, "rank in"], Float32[Array, "out rank"]]:
    """Return factors A and B whose product B A approximates a matrix.

    Randomized singular value decomposition with power iterations: Halko, Martinsson, Tropp,
    "Finding structure with randomness", arXiv 0909.4061, algorithms 4.4 and 5.1. It needs products
    with the matrix alone, which run sharded on a mesh. Both factors get the square roots of the
    singular values.

    Args:
        matrix: the matrix.
        rank: number of singular triplets, at most the smaller side.
        key: key of the random directions.
    """
    rows, columns = matrix.shape
    sketch = min(rank + _OVERSAMPLING, rows, columns)
    with jax.default_matmul_precision("highest"):
        basis = jnp.linalg.qr(matrix @ jax.random.normal(key, (columns, sketch)))[0]
        for _ in range(_POWER_ITERATIONS):
            other = jnp.linalg.qr(matrix.T @ basis)[0]
            basis = jnp.linalg.qr(matrix @ other)[0]
        u, s, vt = jnp.linalg.svd(basis.T @ matrix, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        return root[:, None] * vt[:rank], basis @ u[:, :rank] * root


def compressed_factors(
    a: Float32[Array, "total in"], b: Float32[Array, "out total"], rank: int
) -> tuple[Float32[Array, "rank in"], Float32[Array, "out rank"]]:
    """Return the best factors of a smaller rank of the product B A, which is never formed.

    Args:
        a: the right factor.
        b: the left factor.
        rank: the new rank, at most the number of rows of `a`.
    """
    with jax.default_matmul_precision("highest"):
        left, left_triangle = jnp.linalg.qr(b)
        right, right_triangle = jnp.linalg.qr(a.T)
        u, s, vt = jnp.linalg.svd(left_triangle @ right_triangle.T, full_matrices=False)
        root = jnp.sqrt(s[:rank])
        return root[:, None] * (vt[:rank] @ right.T), left @ u[:, :rank] * root


def relative_error(
    matrix: Float32[Array, "out in"],
    a: Float32[Array, "rank in"],
    b: Float32[Array, "out rank"],
) -> Float32[Array, ""]:
    """Return the norm of what B A lacks of a matrix, relative to the matrix's."""
    rest = matrix - jnp.matmul(b, a, precision="highest")
    return jnp.sqrt(jnp.sum(rest * rest) / jnp.sum(matrix * matrix))
