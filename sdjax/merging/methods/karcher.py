"""Karcher mean: the point of the sphere with the least squared angle to all experts.

Karcher, "Riemannian center of mass and mollifier smoothing", Communications on Pure and Applied
Mathematics 30 (1977), by its fixed-point iteration; on weights arXiv 2603.04972 and mergekit. The
directions of the tensors are averaged on the sphere, and the result has the tensors' mean length;
tensors shorter than ``tol`` have no direction and count only there.

``max_iter`` steps at most, fewer where the step is shorter than ``tol``. Every iterate is a
combination of the experts, so the iteration runs on coefficients and inner products alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._geometry import gram, linear_combination

FORMULA = "τ = mean|τ_j| · argmin_m Σ ∠(m, τ_j)², m on the sphere"
RECIPE = RecipeSchema(base="plain")


def merge_models(
    task_vectors: dict[str, jax.Array], max_iter: int = 10, tol: float = 1e-5
) -> jax.Array:
    vectors = list(task_vectors.values())
    if len(vectors) == 1:
        return vectors[0]
    products = gram(vectors)  # [k, l]
    lengths = jnp.sqrt(jnp.diagonal(products))  # [k]
    valid = lengths > tol
    inverse = jnp.where(valid, 1.0 / jnp.where(valid, lengths, 1.0), 0.0)
    unit = products * inverse[:, None] * inverse[None, :]  # [k, l], of the directions
    share = valid / jnp.maximum(jnp.sum(valid), 1)  # [k]

    def length(coefficients: jax.Array) -> jax.Array:
        return jnp.sqrt(jnp.maximum(coefficients @ unit @ coefficients, 0.0))

    def on_sphere(coefficients: jax.Array) -> jax.Array:
        norm = length(coefficients)
        return coefficients / jnp.where(norm > tol, norm, 1.0)

    def tangent_at(mean: jax.Array) -> jax.Array:
        cosine = jnp.clip(unit @ mean, -1.0, 1.0)  # [k]
        angle = jnp.arccos(cosine)
        apart = angle >= tol
        pull = jnp.where(apart, share * angle / jnp.where(apart, jnp.sin(angle), 1.0), 0.0)
        return pull - jnp.sum(pull * cosine) * mean

    def step(carry: tuple) -> tuple:
        count, mean, tangent, norm = carry
        towards = jnp.cos(norm) * mean + jnp.sin(norm) / norm * tangent
        return (count + 1, *_with_tangent(on_sphere(towards)))

    def _with_tangent(mean: jax.Array) -> tuple:
        tangent = tangent_at(mean)
        return mean, tangent, length(tangent)

    first = jnp.zeros_like(lengths).at[jnp.argmax(valid)].set(1.0)
    start = jnp.where(length(share) < tol, first, on_sphere(share))
    _, mean, _, _ = jax.lax.while_loop(
        lambda carry: (carry[0] < max_iter) & (carry[3] >= tol),
        step,
        (jnp.int32(0), *_with_tangent(start)),
    )
    return linear_combination(jnp.mean(lengths) * mean * inverse, vectors)
