"""RAM+: as RAM, with an expert's own changes made up for what it loses where it shares.

"Reinforced Agent Merging", arXiv 2601.13572, in mergekit's tensor-local form: an expert's ratio of
shared to own changes is taken in each tensor, where the paper takes it over the whole model. Own
changes are scaled by 1 + ``r`` min(ratio, ``alpha``).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._overlap import changed_elements
from sdjax.merging.reductions import counts

FORMULA = "τ = λ_j τ_j where j alone changed, the mean where several; λ_j = 1 + r min(ρ_j, α)"
RECIPE = RecipeSchema()


def merge_models(
    task_vectors: dict[str, jax.Array],
    r: float = 0.1,
    alpha: float = 0.2,
    epsilon: float = 1e-5,
) -> jax.Array:
    kept, masks, count = changed_elements(task_vectors, epsilon)
    merged = jnp.zeros_like(count)
    several = counts([mask & (count > 1) for mask in masks.values()])
    one = counts([mask & (count == 1) for mask in masks.values()])
    for vector, shared, alone in zip(kept.values(), several, one, strict=True):
        share = shared / jnp.maximum(alone, epsilon)
        ratio = jnp.where(shared > 0, jnp.clip(share, 0.0, alpha), 0.0)  # with an epsilon of zero
        merged += jnp.where(count > 1, vector / jnp.maximum(count, 1.0), (1 + r * ratio) * vector)
    return merged
