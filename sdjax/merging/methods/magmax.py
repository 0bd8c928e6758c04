"""MagMax: for each element, the task vector of largest magnitude.

Marczak et al., "MagMax: leveraging model merging for seamless continual learning",
arXiv 2407.06322. Ties go to the earlier expert.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema

FORMULA = "τ = λ τ_{j*}, j* = argmax_j |τ_j| for each element"
RECIPE = RecipeSchema(param_names={"scale": "lambda"})


def merge_models(task_vectors: TaskVectors, scale: float = 1.0) -> Tensor:
    """Return the elementwise task vector of largest magnitude."""
    first, *others = task_vectors.values()
    merged = first
    for vector in others:
        merged = jnp.where(jnp.abs(vector) > jnp.abs(merged), vector, merged)
    return scale * merged
