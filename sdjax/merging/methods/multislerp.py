"""Multi-SLERP: the barycentre of several experts on the sphere, at their mean length.

Goddard, "Multi-SLERP", https://goddard.blog/posts/multislerp-wow-what-a-cool-idea. The experts'
directions are averaged, and the mean is drawn out to the sphere, where the original goes on to
average in the tangent space at that point. With the same weights the tangents' average is zero by
construction (sum w (u - <u,m> m) = M - |M| m = 0 for the mean M = |M| m), so that the step is not
taken here; mergekit's result agrees to rounding.

Where the directions cancel, the experts are averaged linearly (mergekit does so for two, and fails
for more). With one expert that one is returned. Against a base the sphere is around the base.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert
from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._geometry import gram, linear_combination

FORMULA = "τ = Σ w_j |τ_j| · m / |m|, m = Σ w_j τ_j / |τ_j|"
RECIPE = RecipeSchema(
    base="optional", param_names={"normalize": "normalize_weights"}, required=("weight",)
)


def merge_models(
    task_vectors: dict[str, jax.Array],
    weight: PerExpert = 1.0,
    normalize: bool = True,
    eps: float = 1e-8,
) -> jax.Array:
    vectors = list(task_vectors.values())
    if len(vectors) == 1:
        return vectors[0]
    weights = jnp.stack(list(weight.values()))  # [k]
    if normalize:
        weights = weights / jnp.sum(weights)
    products = gram(vectors)  # [k, l]
    lengths = jnp.sqrt(jnp.diagonal(products))  # [k]
    shares = weights / (lengths + eps)
    square = shares @ products @ shares
    length = jnp.sqrt(jnp.maximum(square, 0.0))
    # Sums in float32 leave that much of what cancels.
    cancel = (length < eps) | (square < 1e-6 * jnp.sum(jnp.abs(weights)) ** 2)
    drawn_out = shares / jnp.where(cancel, 1.0, length) * jnp.sum(weights * lengths)
    return linear_combination(jnp.where(cancel, weights, drawn_out), vectors)
