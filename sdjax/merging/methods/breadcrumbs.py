"""Model Breadcrumbs: drop the largest and the smallest elements, then scale and add.

Davari, Belilovsky, "Model breadcrumbs: scaling multi-task model merging with sparse masks", arXiv
2312.06795. `gamma` is the fraction of largest magnitude that is dropped as outliers, and `density`
the fraction that is kept below it (the paper's thresholds are 1 - gamma and 1 - gamma - density: it
keeps the elements between 85% and 99.3%). If both do not fit, fewer outliers are dropped, as in
mergekit. `keep_ties`: as in `ties`.
"""

from __future__ import annotations

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import RESCALE_CHOICES, weighted_sum
from sdjax.merging.operations.sparsify import trim_both_ends

FORMULA = "τ = λ Σ w_j t_j, t_j = τ_j where |τ_j| ranks in (1-γ-d, 1-γ], else 0"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0, "gamma": 0.01},
    required=("weight",),
    normalized={"weight": "normalize"},
    unit_interval=("density", "gamma"),
    choices={"rescale": RESCALE_CHOICES},
)


def merge_models(
    task_vectors: TaskVectors,
    weight: PerExpert = 0.3,
    density: PerExpert = 0.143,
    gamma: PerExpert = 0.007,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "none",
    keep_ties: bool = False,
) -> Tensor:
    """Return the weighted sum of task vectors without outliers and small elements."""
    trimmed = trim_both_ends(task_vectors, density, gamma, rescale, keep_ties)
    return scale * weighted_sum(trimmed, weight, normalize)
