"""SLERP: the arc between two experts, instead of the line.

Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985; on weights as in mergekit: the
angle is that between the two flattened tensors, the tensors themselves are not normalised, and
nearly parallel ones (|cos| > 0.9995) are interpolated linearly.

``t`` is the place on the arc from the first expert (0) to the second (1). With more than two
experts the result so far is interpolated with the n-th at 2t/n, in slot order: at t = 0.5 every
expert counts the same up to curvature. It works on what it is given: in a search on task vectors
against the seed (an arc around the seed), in a recipe, which subtracts no base, on the weights (an
arc around the origin, from base_model to the other model).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._geometry import gram, slerp_weights

FORMULA = "τ = (sin((1-t)θ) τ_1 + sin(tθ) τ_2) / sin θ, θ = ∠(τ_1, τ_2)"
RECIPE = RecipeSchema(base="first", min_models=2, max_models=2, required=("t",))


def merge_models(task_vectors: dict[str, jax.Array], t: float = 0.5) -> jax.Array:
    first, *others = task_vectors.values()
    merged = first
    for n, vector in enumerate(others, start=2):
        place = jnp.minimum(2 * t / n, 1.0) if n > 2 else jnp.asarray(t)
        products = gram([merged, vector])  # [2, 2]
        lengths = jnp.sqrt(products[0, 0]) * jnp.sqrt(products[1, 1])
        cosine = products[0, 1] / jnp.where(lengths > 1e-16, lengths, 1.0)
        share, other = slerp_weights(cosine, place, jnp.abs(cosine) > 0.9995)
        merged = share * merged + other * vector
    return merged
