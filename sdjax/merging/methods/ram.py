"""RAM: add what one expert alone has changed, average what several have.

"Reinforced Agent Merging", arXiv 2601.13572. A change counts from a magnitude above ``epsilon``.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._overlap import changed_elements

FORMULA = "τ = Σ_{j∈C} τ_j / |C|, C = {j: |τ_j| > ε}"
RECIPE = RecipeSchema()


def merge_models(task_vectors: dict[str, jax.Array], epsilon: float = 1e-5) -> jax.Array:
    kept, _, count = changed_elements(task_vectors, epsilon)
    return sum(kept.values()) / jnp.maximum(count, 1.0)
