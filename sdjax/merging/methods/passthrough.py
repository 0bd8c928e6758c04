"""Passthrough: a single model, optionally scaled; used to stack slices of layers.

mergekit's method for "frankenmerges"; no paper. More than one expert is an error.
"""

from __future__ import annotations

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema

FORMULA = "τ = s τ_1"
RECIPE = RecipeSchema(base="plain", max_models=1)


def merge_models(task_vectors: TaskVectors, scale: PerExpert = 1.0) -> Tensor:
    """Return the scaled task vector."""
    if len(task_vectors) != 1:
        raise ValueError("takes exactly one expert")
    ((name, vector),) = task_vectors.items()
    return scale[name] * vector
