"""TIES: trim each task vector, elect a sign per element, average the elements that agree.

Yadav et al., "TIES-Merging: resolving interference when merging models", arXiv 2306.01708. Trimming
keeps the elements of largest magnitude, a fraction `density` of each tensor (20% in the paper).

As in mergekit, signs are elected on the weighted task vectors and the mean is weighted;
`elect="plain"` elects on the task vectors themselves, which is the paper's form if the weights are
equal. `rescale="l1"` is mergekit's option to restore the sum of magnitudes after trimming.

Exactly the fraction `density` is kept, as in mergekit. If magnitudes tie, as small differences of
bfloat16 weights do, a fixed pseudorandom choice of them is. With `keep_ties`, every element that
ties with the smallest one kept is kept too, as in the authors' code.
"""

from __future__ import annotations

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import ELECT_CHOICES, RESCALE_CHOICES, elected_sum
from sdjax.merging.operations.sparsify import trim

FORMULA = "τ = λ Σ_{j∈A} w_j t_j / Σ_{j∈A} w_j, t_j = top_d(τ_j), A = {j: sgn t_j = sgn Σ w_i t_i}"
RECIPE = RecipeSchema(
    param_names={"scale": "lambda"},
    defaults={"density": 1.0},
    required=("weight",),
    unit_interval=("density",),
    choices={"rescale": RESCALE_CHOICES, "elect": ELECT_CHOICES},
)


def merge_models(
    task_vectors: TaskVectors,
    weight: PerExpert = 1.0,
    density: PerExpert = 0.2,
    scale: float = 1.0,
    normalize: bool = True,
    elect: str = "weighted",
    rescale: str = "none",
    keep_ties: bool = False,
) -> Tensor:
    """Return the elected sum of the trimmed task vectors."""
    trimmed = trim(task_vectors, density, rescale, keep_ties)
    return scale * elected_sum(trimmed, weight, normalize, elect)
