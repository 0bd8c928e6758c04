"""DELLA without sign election: drop at random by rank of magnitude, rescale, add.

Deep, Bhardwaj, Poria, "DELLA-Merging", arXiv 2406.11617; `della` explains the hyperparameters. As
in mergekit the sum is not normalized by default.
"""

from __future__ import annotations

from jaxtyping import Array, Key

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import RESCALE_CHOICES, weighted_sum
from sdjax.merging.operations.sparsify import random_drop_by_rank

FORMULA = "τ = λ Σ w_j (m_j ⊙ τ_j) / p_j, m_j ~ Bernoulli(p_j), p_j = d_j - ε + 2ε rank|τ_j|"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0, "epsilon": 0.15, "rescale": "l1"},
    required=("weight",),
    normalized={"weight": "normalize"},
    unit_interval=("density", "epsilon"),
    choices={"rescale": RESCALE_CHOICES},
)


def merge_models(
    task_vectors: TaskVectors,
    key: Key[Array, ""],
    weight: PerExpert = 0.4,
    density: PerExpert = 0.5,
    epsilon: PerExpert = 0.1,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "density",
) -> Tensor:
    """Return the weighted sum of task vectors sparsified by rank."""
    dropped = random_drop_by_rank(task_vectors, key, density, epsilon, rescale)
    return scale * weighted_sum(dropped, weight, normalize)
