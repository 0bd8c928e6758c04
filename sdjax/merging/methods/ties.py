"""TIES: trim each task vector, elect a sign for each element, average those that agree.

Yadav et al., "TIES-Merging: resolving interference when merging models", arXiv 2306.01708. Trimming
keeps the share ``density`` of largest magnitude in each tensor (the paper: 20 %).

As in mergekit, signs are elected on the weighted task vectors and the mean is weighted;
``elect="plain"`` elects on the task vectors themselves, which with equal weights is the paper's.
Elements that tie with the last one kept are kept too. ``rescale="l1"`` is mergekit's option to
restore the sum of magnitudes after trimming.
"""

from __future__ import annotations

import jax

from sdjax.merging.algorithm import PerExpert
from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._mixing import ELECT_CHOICES, RESCALE_CHOICES, elected_sum
from sdjax.merging.methods._trimming import trim

FORMULA = "τ = λ Σ_{j∈A} w_j t_j / Σ_{j∈A} w_j, t_j = top_d(τ_j), A = {j: sgn t_j = sgn Σ w_i t_i}"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0},
    required=("weight",),
    unit_interval=("density",),
    choices={"rescale": RESCALE_CHOICES, "elect": ELECT_CHOICES},
)


def merge_models(
    task_vectors: dict[str, jax.Array],
    weight: PerExpert = 1.0,
    density: PerExpert = 0.2,
    scale: float = 1.0,
    normalize: bool = True,
    elect: str = "weighted",
    rescale: str = "none",
) -> jax.Array:
    trimmed = trim(task_vectors, density, rescale)
    return scale * elected_sum(trimmed, weight, normalize, elect)
