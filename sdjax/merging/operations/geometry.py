"""Norms, angles and polar factors of task vectors, for the spherical and spectral methods.

The spherical methods return a weighted sum of the task vectors whose weights follow from their
inner products alone. The tensors are therefore read once for the products and once for the sum, and
on a mesh only scalars are communicated.

Axes: rows and columns (of a matrix), experts, *angles (any shape).
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float32

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Tensor
from sdjax.xla.reductions import sums


def gram(vectors: Sequence[Tensor]) -> Float32[Array, "experts experts"]:
    """Return the inner products of the flattened vectors."""
    count = len(vectors)
    pairs = list(itertools.combinations_with_replacement(range(count), 2))
    products = dict(zip(pairs, sums([vectors[i] * vectors[j] for i, j in pairs]), strict=True))
    return jnp.stack(
        [jnp.stack([products[min(i, j), max(i, j)] for j in range(count)]) for i in range(count)]
    )


def linear_combination(weights: Float32[Array, " experts"], vectors: Sequence[Tensor]) -> Tensor:
    """Return the sum of weights[k] * vectors[k]."""
    return jnp.asarray(sum(weights[i] * vector for i, vector in enumerate(vectors)))


def slerp_weights(
    cosine: Float32[Array, "*angles"],
    t: Float32[Array, ""],
    linear: Bool[Array, "*angles"],
) -> tuple[jax.Array, jax.Array]:
    """Return the weights of both endpoints at position `t` on an arc; linear where `linear`."""
    angle = jnp.arccos(jnp.where(linear, 0.0, cosine))
    sine = jnp.sin(angle)
    return (
        jnp.where(linear, 1.0 - t, jnp.sin((1.0 - t) * angle) / sine),
        jnp.where(linear, t, jnp.sin(t * angle) / sine),
    )


def nearest_orthonormal(
    matrix: Float32[Array, "rows columns"],
) -> Float32[Array, "rows columns"]:
    """Return U Vᵀ of the singular value decomposition (the polar factor)."""
    u, _, vt = jnp.linalg.svd(matrix, full_matrices=False)
    return u @ vt


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def forbid_gradient(x: Tensor, reason: str) -> Tensor:
    """Return `x`; the derivative of a function of it is an error with this reason.

    The singular vectors of a matrix of low rank have no derivative: it would be NaN or noise.
    """
    del reason
    return x


@forbid_gradient.defjvp
def _forbid_gradient_jvp(
    reason: str, primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
    del primals, tangents
    raise UserError(f"the weights have no derivative here: {reason}")
