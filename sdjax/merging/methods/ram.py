"""RAM: sum of changes made by a single expert, and average of changes made by several experts.

"Reinforced Agent Merging", arXiv 2601.13572. A change counts if its magnitude exceeds `epsilon`.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import changed_elements

FORMULA = "τ = Σ_{j∈C} τ_j / |C|, C = {j: |τ_j| > ε}"
RECIPE = RecipeSchema()


def merge_models(task_vectors: TaskVectors, epsilon: float = 1e-5) -> Tensor:
    """Return the average over the experts that changed each element."""
    changes, _, count = changed_elements(task_vectors, epsilon)
    return sum(changes.values()) / jnp.maximum(count, 1.0)
