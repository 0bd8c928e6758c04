"""Multi-SLERP: the barycenter of several experts on the sphere, at their mean norm.

Goddard, "Multi-SLERP", https://goddard.blog/posts/multislerp-wow-what-a-cool-idea. The experts'
directions are averaged and the mean is projected onto the sphere. The original then averages in the
tangent space at that point; with the same weights that average is zero by construction
(sum w (u - <u,m> m) = M - |M| m = 0 for the mean M = |M| m), so the step is omitted here, and
mergekit's result agrees up to rounding.

If the directions cancel, the experts are averaged linearly (mergekit does so for two and fails for
more). A single expert is returned unchanged. With a base, the sphere is centered at the base.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.geometry import gram, linear_combination

FORMULA = "τ = Σ w_j |τ_j| · m / |m|, m = Σ w_j τ_j / |τ_j|"
RECIPE = RecipeSchema(
    base="optional",
    param_names={"normalize": "normalize_weights"},
    required=("weight",),
    normalized={"weight": "normalize"},
)


def merge_models(
    task_vectors: TaskVectors,
    weight: PerExpert = 1.0,
    normalize: bool = True,
    eps: float = 1e-8,
) -> Tensor:
    """Return the spherical barycenter of the task vectors."""
    vectors = list(task_vectors.values())
    if len(vectors) == 1:
        return vectors[0]
    weights = jnp.stack(list(weight.values()))  # [k]
    if normalize:
        weights = weights / jnp.sum(weights)
    products = gram(vectors)  # [k, l]
    norms = jnp.sqrt(jnp.diagonal(products))  # [k]
    coefficients = weights / (norms + eps)
    square = coefficients @ products @ coefficients
    norm = jnp.sqrt(jnp.maximum(square, 0.0))
    # Float32 sums leave a residue of this size if the directions cancel.
    cancel = (norm < eps) | (square < 1e-6 * jnp.sum(jnp.abs(weights)) ** 2)
    on_sphere = coefficients / jnp.where(cancel, 1.0, norm) * jnp.sum(weights * norms)
    return linear_combination(jnp.where(cancel, weights, on_sphere), vectors)
