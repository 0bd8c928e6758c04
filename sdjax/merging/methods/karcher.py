"""Karcher mean: the point of the sphere with the least squared angle to all experts.

Karcher, "Riemannian center of mass and mollifier smoothing", Communications on Pure and Applied
Mathematics 30 (1977), by its fixed-point iteration; applied to weights in arXiv 2603.04972 and in
mergekit. The directions of the tensors are averaged on the sphere, and the result has their mean
norm. Tensors of norm below `tol` have no direction and contribute to the mean norm only.

The iteration ends after `max_iter` steps, or when a step is shorter than `tol`. Every iterate is a
combination of the experts, so it runs on coefficients and inner products alone.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.geometry import gram, linear_combination

FORMULA = "τ = mean|τ_j| · argmin_m Σ ∠(m, τ_j)², m on the sphere"
RECIPE = RecipeSchema(base="plain")


def merge_models(task_vectors: TaskVectors, max_iter: int = 10, tol: float = 1e-5) -> Tensor:
    """Return the Karcher mean of the task vectors."""
    vectors = list(task_vectors.values())
    if len(vectors) == 1:
        return vectors[0]
    products = gram(vectors)  # [k, l]
    norms = jnp.sqrt(jnp.diagonal(products))  # [k]
    valid = norms > tol
    inverse = jnp.where(valid, 1.0 / jnp.where(valid, norms, 1.0), 0.0)
    unit = products * inverse[:, None] * inverse[None, :]  # [k, l], of the directions
    weights = valid / jnp.maximum(jnp.sum(valid), 1)  # [k]

    def norm_of(coefficients: jax.Array) -> jax.Array:
        square = coefficients @ unit @ coefficients
        # Not jnp.sqrt of zero, whose derivative is infinite.
        return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)

    def normalized(coefficients: jax.Array) -> jax.Array:
        norm = norm_of(coefficients)
        return coefficients / jnp.where(norm > tol, norm, 1.0)

    def tangent_at(mean: jax.Array) -> jax.Array:
        cosine = jnp.clip(unit @ mean, -1.0, 1.0)  # [k]
        inside = jnp.abs(cosine) < 1.0
        angle = jnp.arccos(jnp.where(inside, cosine, 0.0))
        angle = jnp.where(inside, angle, jnp.where(cosine > 0, 0.0, jnp.pi))
        separate = angle >= tol
        pull = jnp.where(separate, weights * angle / jnp.where(separate, jnp.sin(angle), 1.0), 0.0)
        return pull - jnp.sum(pull * cosine) * mean

    def step(_: jax.Array, carry: tuple) -> tuple:
        mean, tangent, norm = carry
        moving = norm >= tol
        length = jnp.where(moving, norm, 1.0)
        moved = jnp.cos(length) * mean + jnp.sin(length) / length * tangent
        after = with_tangent(normalized(moved))
        return tuple(jnp.where(moving, new, old) for new, old in zip(after, carry, strict=True))

    def with_tangent(mean: jax.Array) -> tuple:
        tangent = tangent_at(mean)
        return mean, tangent, norm_of(tangent)

    first = jnp.zeros_like(norms).at[jnp.argmax(valid)].set(1.0)
    start = jnp.where(norm_of(weights) < tol, first, normalized(weights))
    # A fixed number of steps, since a while loop cannot be differentiated in reverse.
    mean, _, _ = jax.lax.fori_loop(0, max_iter, step, with_tangent(start))
    return linear_combination(jnp.mean(norms) * mean * inverse, vectors)
