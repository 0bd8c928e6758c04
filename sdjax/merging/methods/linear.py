"""Linear: the weighted average of the experts.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time", arXiv 2203.05482. As in mergekit, the weights are divided by
their sum unless `normalize` is false.

Averaging task vectors equals averaging the experts themselves:
base + sum w_j (C_j - base) / sum w_j = sum w_j C_j / sum w_j. The method therefore gives the same
result in a search (task vectors relative to the seed) and in a recipe (no base).
"""

from __future__ import annotations

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import weighted_sum

FORMULA = "τ = Σ w_j τ_j / Σ w_j"
RECIPE = RecipeSchema(base="plain", required=("weight",), normalized={"weight": "normalize"})


def merge_models(
    task_vectors: TaskVectors, weight: PerExpert = 1.0, normalize: bool = True
) -> Tensor:
    """Return the weighted average of the task vectors."""
    return weighted_sum(task_vectors, weight, normalize)
