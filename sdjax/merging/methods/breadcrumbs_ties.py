"""Model Breadcrumbs with TIES: drop as in Breadcrumbs, then elect signs (mergekit).

Davari, Belilovsky, "Model breadcrumbs", arXiv 2312.06795, with the sign election of Yadav et al.,
"TIES-Merging", arXiv 2306.01708. Hyperparameters are those of `breadcrumbs` and `ties`; as in
mergekit the sum is not normalized by default.
"""

from __future__ import annotations

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import ELECT_CHOICES, RESCALE_CHOICES, elected_sum
from sdjax.merging.operations.sparsify import trim_both_ends

FORMULA = "τ = λ Σ_{j∈A} w_j t_j, t_j as in breadcrumbs, A = {j: sgn t_j = sgn Σ w_i t_i}"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0, "gamma": 0.01},
    required=("weight",),
    unit_interval=("density", "gamma"),
    choices={"rescale": RESCALE_CHOICES, "elect": ELECT_CHOICES},
)


def merge_models(
    task_vectors: TaskVectors,
    weight: PerExpert = 0.3,
    density: PerExpert = 0.143,
    gamma: PerExpert = 0.007,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "none",
    elect: str = "weighted",
    keep_ties: bool = False,
) -> Tensor:
    """Return the elected sum of task vectors without outliers and small elements."""
    trimmed = trim_both_ends(task_vectors, density, gamma, rescale, keep_ties)
    return scale * elected_sum(trimmed, weight, normalize, elect)
