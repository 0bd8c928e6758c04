"""SLERP: the arc between two experts instead of the line.

Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; applied to weights as in
mergekit: the angle is that between the flattened tensors, the tensors are not normalized, and
nearly parallel ones (|cos| > 0.9995) are interpolated linearly.

`t` is the position on the arc from the first expert (0) to the second (1). With more than two
experts the result so far is interpolated with the n-th at 2t/n, in slot order; at t = 0.5 all
experts have the same weight up to curvature. In a search the arc is around the seed, since the
inputs are task vectors; in a recipe, which subtracts no base, it is around the origin, from
base_model to the other model.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.geometry import gram, slerp_weights

FORMULA = "τ = (sin((1-t)θ) τ_1 + sin(tθ) τ_2) / sin θ, θ = ∠(τ_1, τ_2)"
RECIPE = RecipeSchema(base="first", min_models=2, max_models=2, required=("t",))


def merge_models(task_vectors: TaskVectors, t: float = 0.5) -> Tensor:
    """Return the point on the arc through the task vectors."""
    first, *others = task_vectors.values()
    merged = first
    for n, vector in enumerate(others, start=2):
        position = jnp.minimum(2 * t / n, 1.0) if n > 2 else jnp.asarray(t)
        products = gram([merged, vector])  # [2, 2]
        norms = jnp.sqrt(products[0, 0]) * jnp.sqrt(products[1, 1])
        cosine = products[0, 1] / jnp.where(norms > 1e-16, norms, 1.0)
        first_weight, second_weight = slerp_weights(cosine, position, jnp.abs(cosine) > 0.9995)
        merged = first_weight * merged + second_weight * vector
    return merged
