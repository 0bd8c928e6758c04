"""DARE with sign election: drop at random and rescale, then elect signs as in TIES.

Yu et al., "Language models are Super Mario: absorbing abilities from homologous models as a free
lunch", arXiv 2311.03099, with the sign election of Yadav et al., "TIES-Merging", arXiv 2306.01708.
Hyperparameters are those of `dare_linear` and `ties`; as in mergekit the sum is not normalized by
default.
"""

from __future__ import annotations

from jaxtyping import Array, Key

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import ELECT_CHOICES, RESCALE_CHOICES, elected_sum
from sdjax.merging.operations.sparsify import random_drop

FORMULA = "τ = λ Σ_{j∈A} w_j t_j, t_j = (m_j ⊙ τ_j) / d_j, A = {j: sgn t_j = sgn Σ w_i t_i}"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0, "rescale": "l1"},
    required=("weight",),
    unit_interval=("density",),
    choices={"rescale": RESCALE_CHOICES, "elect": ELECT_CHOICES},
)


def merge_models(
    task_vectors: TaskVectors,
    key: Key[Array, ""],
    weight: PerExpert = 0.4,
    density: PerExpert = 0.5,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "density",
    elect: str = "weighted",
) -> Tensor:
    """Return the elected sum of randomly sparsified task vectors."""
    dropped = random_drop(task_vectors, key, density, rescale)
    return scale * elected_sum(dropped, weight, normalize, elect)
