"""Model Breadcrumbs with the election of signs, mergekit's cross of the two.

Davari, Belilovsky, "Model breadcrumbs", arXiv 2312.06795, with the election of Yadav et al.,
"TIES-Merging", arXiv 2306.01708. Parameters as in ``breadcrumbs`` and ``ties``; as in mergekit the
sum is not normalised by default.
"""

from __future__ import annotations

import jax

from sdjax.merging.algorithm import PerExpert
from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._mixing import ELECT_CHOICES, RESCALE_CHOICES, elected_sum
from sdjax.merging.methods._trimming import trim_both_ends

FORMULA = "τ = λ Σ_{j∈A} w_j t_j, t_j as in breadcrumbs, A = {j: sgn t_j = sgn Σ w_i t_i}"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0, "gamma": 0.01},
    required=("weight",),
    unit_interval=("density", "gamma"),
    choices={"rescale": RESCALE_CHOICES, "elect": ELECT_CHOICES},
)


def merge_models(
    task_vectors: dict[str, jax.Array],
    weight: PerExpert = 0.3,
    density: PerExpert = 0.143,
    gamma: PerExpert = 0.007,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "none",
    elect: str = "weighted",
) -> jax.Array:
    trimmed = trim_both_ends(task_vectors, density, gamma, rescale)
    return scale * elected_sum(trimmed, weight, normalize, elect)
