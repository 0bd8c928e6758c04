"""Passthrough: one model as it is, or scaled; what slices of layers are stacked with.

mergekit's method for "frankenmerges"; no paper. With more than one expert it is an error.
"""

from __future__ import annotations

import jax

from sdjax.merging.algorithm import PerExpert
from sdjax.merging.method import RecipeSchema

FORMULA = "τ = s τ_1"
RECIPE = RecipeSchema(base="plain", max_models=1)


def merge_models(task_vectors: dict[str, jax.Array], scale: PerExpert = 1.0) -> jax.Array:
    if len(task_vectors) != 1:
        raise ValueError("passthrough takes exactly one expert")
    ((name, vector),) = task_vectors.items()
    return scale[name] * vector
