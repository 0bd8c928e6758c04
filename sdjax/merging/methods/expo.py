"""ExPO: extrapolate from the base beyond an aligned model.

Zheng et al., "Model extrapolation expedites alignment", arXiv 2404.16792. The base is the model
before alignment (SFT), the expert the one after it (DPO, RLHF). The paper tunes `alpha` on a
development set, between 0.1 and 0.5 for public models; 0.3 is in the middle.
"""

from __future__ import annotations

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema

FORMULA = "τ = (1 + α) τ_1"
RECIPE = RecipeSchema(min_models=1, max_models=1, required=("alpha",))


def merge_models(task_vectors: TaskVectors, alpha: float = 0.3) -> Tensor:
    """Return the task vector, extended by the fraction `alpha`."""
    if len(task_vectors) != 1:
        raise ValueError("takes exactly one expert")
    (vector,) = task_vectors.values()
    return (1 + alpha) * vector
