"""MagMax: for each element, the task vector of largest magnitude.

Marczak et al., "MagMax: leveraging model merging for seamless continual learning",
arXiv 2407.06322. Of equal magnitudes the earlier expert's is taken.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.method import RecipeSchema

FORMULA = "τ = λ τ_{j*}, j* = argmax_j |τ_j| for each element"
RECIPE = RecipeSchema(param_names={"scale": "lambda"})


def merge_models(task_vectors: dict[str, jax.Array], scale: float = 1.0) -> jax.Array:
    first, *others = task_vectors.values()
    merged = first
    for vector in others:
        merged = jnp.where(jnp.abs(vector) > jnp.abs(merged), vector, merged)
    return scale * merged
