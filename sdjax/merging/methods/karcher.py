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
        return jnp.sqrt(jnp.maximum(coefficients @ unit @ coefficients, 0.0))

    def normalized(coefficients: jax.Array) -> jax.Array:
        norm = norm_of(coefficients)
        return coefficients / jnp.where(norm > tol, norm, 1.0)

    def tangent_at(mean: jax.Array) -> jax.Array:
        cosine = jnp.clip(unit @ mean, -1.0, 1.0)  # [k]
        angle = jnp.arccos(cosine)
        separate = angle >= tol
        pull = jnp.where(separate, weights * angle / jnp.where(separate, jnp.sin(angle), 1.0), 0.0)
        return pull - jnp.sum(pull * cosine) * mean

    def step(carry: tuple) -> tuple:
        count, mean, tangent, norm = carry
        moved = jnp.cos(norm) * mean + jnp.sin(norm) / norm * tangent
        return (count + 1, *with_tangent(normalized(moved)))

    def with_tangent(mean: jax.Array) -> tuple:
        tangent = tangent_at(mean)
        return mean, tangent, norm_of(tangent)

    first = jnp.zeros_like(norms).at[jnp.argmax(valid)].set(1.0)
    start = jnp.where(norm_of(weights) < tol, first, normalized(weights))
    _, mean, _, _ = jax.lax.while_loop(
        lambda carry: (carry[0] < max_iter) & (carry[3] >= tol),
        step,
        (jnp.int32(0), *with_tangent(start)),
    )
    return linear_combination(jnp.mean(norms) * mean * inverse, vectors)
