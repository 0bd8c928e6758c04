"""DARE with the election of signs: drop at random and rescale, then elect as TIES does.

Yu et al., "Language models are Super Mario: absorbing abilities from homologous models as a free
lunch", arXiv 2311.03099, with the election of Yadav et al., "TIES-Merging", arXiv 2306.01708.
Parameters as in ``dare_linear`` and ``ties``; as in mergekit the sum is not normalised by default.
"""

from __future__ import annotations

import jax

from sdjax.merging.algorithm import PerExpert
from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._dropping import random_drop
from sdjax.merging.methods._mixing import ELECT_CHOICES, RESCALE_CHOICES, elected_sum

FORMULA = "τ = λ Σ_{j∈A} w_j t_j, t_j = (m_j ⊙ τ_j) / d_j, A = {j: sgn t_j = sgn Σ w_i t_i}"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0, "rescale": "l1"},
    required=("weight",),
    unit_interval=("density",),
    choices={"rescale": RESCALE_CHOICES, "elect": ELECT_CHOICES},
)


def merge_models(
    task_vectors: dict[str, jax.Array],
    key: jax.Array,
    weight: PerExpert = 0.4,
    density: PerExpert = 0.5,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "density",
    elect: str = "weighted",
) -> jax.Array:
    dropped = random_drop(task_vectors, key, density, rescale)
    return scale * elected_sum(dropped, weight, normalize, elect)
