"""NearSwap: move to the other model where the two are already close.

alchemonaut's method (https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001), as implemented
in mergekit; no paper. An element is swapped completely if it differs by at most `t`, otherwise by
the fraction t / |difference|.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema

FORMULA = "τ = min(1, t / |τ_1|) τ_1"
RECIPE = RecipeSchema(min_models=1, max_models=1, required=("t",))


def merge_models(task_vectors: TaskVectors, t: float = 1e-4) -> Tensor:
    """Return the task vector with large elements scaled down."""
    if len(task_vectors) != 1:
        raise ValueError("takes exactly one expert")
    (vector,) = task_vectors.values()
    return jnp.clip(t / jnp.maximum(jnp.abs(vector), 1e-6), 0.0, 1.0) * vector
