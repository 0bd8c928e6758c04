"""DELLA: drop at random by rank of magnitude, elect signs, average the elements that agree.

Deep, Bhardwaj, Poria, "DELLA-Merging: reducing interference in model merging through
magnitude-based sampling", arXiv 2406.11617. An element of a row is kept with a probability from
`density` - `epsilon` (smallest magnitude) to `density` + `epsilon` (largest). The paper's epsilon
is the whole window, 2 `epsilon` here, and its drop rate is 1 - `density`. `rescale="density"`
divides each element by its own probability, as in the paper; "l1" restores the tensor's sum of
magnitudes, the default of mergekit and therefore of a recipe.
"""

from __future__ import annotations

from jaxtyping import Array, Key

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import ELECT_CHOICES, RESCALE_CHOICES, elected_sum
from sdjax.merging.operations.sparsify import random_drop_by_rank

FORMULA = (
    "τ = λ Σ_{j∈A} w_j t_j / Σ_{j∈A} w_j, t_j = (m_j ⊙ τ_j) / p_j, p_j = d_j - ε + 2ε rank|τ_j|"
)
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0, "epsilon": 0.15, "rescale": "l1"},
    required=("weight",),
    unit_interval=("density", "epsilon"),
    choices={"rescale": RESCALE_CHOICES, "elect": ELECT_CHOICES},
)


def merge_models(
    task_vectors: TaskVectors,
    key: Key[Array, ""],
    weight: PerExpert = 1.0,
    density: PerExpert = 0.5,
    epsilon: PerExpert = 0.1,
    scale: float = 1.0,
    normalize: bool = True,
    rescale: str = "density",
    elect: str = "weighted",
) -> Tensor:
    """Return the elected sum of task vectors sparsified by rank."""
    dropped = random_drop_by_rank(task_vectors, key, density, epsilon, rescale)
    return scale * elected_sum(dropped, weight, normalize, elect)
