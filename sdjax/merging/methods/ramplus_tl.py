"""RAM+: RAM with unique changes amplified to compensate for the averaged ones.

"Reinforced Agent Merging", arXiv 2601.13572, in mergekit's tensor-local form: an expert's ratio of
shared to unique changes is computed per tensor, while the paper computes it over the whole model.
Unique changes are scaled by 1 + `r` min(ratio, `alpha`).
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import changed_elements
from sdjax.xla.reductions import count_true

FORMULA = "τ = λ_j τ_j where j alone changed, the mean where several; λ_j = 1 + r min(ρ_j, α)"
RECIPE = RecipeSchema()


def merge_models(
    task_vectors: TaskVectors,
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
) -> Tensor:
    """Return the average of shared changes plus amplified unique changes."""
    changes, masks, count = changed_elements(task_vectors, epsilon)
    merged = jnp.zeros_like(count)
    shared = count_true([mask & (count > 1) for mask in masks.values()])
    unique = count_true([mask & (count == 1) for mask in masks.values()])
    for vector, num_shared, num_unique in zip(changes.values(), shared, unique, strict=True):
        ratio = jnp.clip(num_shared / jnp.maximum(num_unique, epsilon), 0.0, alpha)
        ratio = jnp.where(num_shared > 0, ratio, 0.0)  # 0 / 0 if epsilon is zero
        merged += jnp.where(count > 1, vector / jnp.maximum(count, 1.0), (1 + r * ratio) * vector)
    return merged
