"""Linear: the weighted average of the experts.

Wortsman et al., "Model soups: averaging weights of multiple fine-tuned models improves accuracy
without increasing inference time", arXiv 2203.05482. As in mergekit, the weights are divided by
their sum unless ``normalize`` is false.

On task vectors, averaging them and averaging the experts themselves is the same:
base + sum w_j (C_j - base) / sum w_j = sum w_j C_j / sum w_j. So the method means the same in a
search (task vectors against the seed) and in a recipe, where the base is a model like any other.
"""

from __future__ import annotations

import jax

from sdjax.merging.algorithm import PerExpert
from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._mixing import weighted_sum

FORMULA = "τ = Σ w_j τ_j / Σ w_j"
RECIPE = RecipeSchema(base="plain", required=("weight",))


def merge_models(
    task_vectors: dict[str, jax.Array], weight: PerExpert = 1.0, normalize: bool = True
) -> jax.Array:
    return weighted_sum(task_vectors, weight, normalize)
