"""DARE with task arithmetic: drop elements at random, rescale the rest, add.

Yu et al., "Language models are Super Mario: absorbing abilities from homologous models as a free
lunch", arXiv 2311.03099. `density` is the fraction kept (the paper's 1 - p). `rescale="density"`
divides by it, as in the paper; "l1" restores the sum of magnitudes, the default of mergekit and
therefore of a recipe.
"""

from __future__ import annotations

from jaxtyping import Array, Key

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import RESCALE_CHOICES, weighted_sum
from sdjax.merging.operations.sparsify import random_drop

FORMULA = "τ = λ Σ w_j (m_j ⊙ τ_j) / d_j, m_j ~ Bernoulli(d_j)"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0, "rescale": "l1"},
    required=("weight",),
    normalized={"weight": "normalize"},
    unit_interval=("density",),
    choices={"rescale": RESCALE_CHOICES},
)


def merge_models(
    task_vectors: TaskVectors,
    key: Key[Array, ""],
    weight: PerExpert = 0.4,
    density: PerExpert = 0.5,
    scale: float = 1.0,
    normalize: bool = False,
    rescale: str = "density",
) -> Tensor:
    """Return the weighted sum of randomly sparsified task vectors."""
    dropped = random_drop(task_vectors, key, density, rescale)
    return scale * weighted_sum(dropped, weight, normalize)
