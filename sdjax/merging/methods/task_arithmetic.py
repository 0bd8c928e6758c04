"""Task arithmetic: scale the experts' task vectors and add them.

Ilharco et al., "Editing models with task arithmetic", arXiv 2212.04089. The default of 0.4 is what
the paper recommends if nothing can be tuned. `normalize` divides by the sum of the weights
(mergekit's option).
"""

from __future__ import annotations

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import weighted_sum

FORMULA = "τ = λ Σ w_j τ_j"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    required=("weight",),
    normalized={"weight": "normalize"},
    ignored=("density", "rescale"),
)


def merge_models(
    task_vectors: TaskVectors,
    weight: PerExpert = 0.4,
    scale: float = 1.0,
    normalize: bool = False,
) -> Tensor:
    """Return the weighted sum of the task vectors."""
    return scale * weighted_sum(task_vectors, weight, normalize)
