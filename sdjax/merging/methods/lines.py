"""LiNeS: task arithmetic whose weight grows linearly with the depth of the layer.

Wang et al., "LiNeS: post-training layer scaling prevents forgetting and enhances model merging",
arXiv 2410.17146. The first layer gets the average of the task vectors times `alpha`, and `beta` is
added to the weight of every task vector up to the last layer. The paper merges N experts with
`alpha` 1 and tunes `beta` on a development set; of one expert it scales the change with `beta` =
1 - `alpha`. Tensors outside the layers are treated like the first layer, as in the authors' code.
"""

from __future__ import annotations

import jax.numpy as jnp
from jaxtyping import Array, Float32

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import weighted_sum

FORMULA = "τ = (α / N + β d) Σ w_j τ_j, d from 0 (first layer) to 1 (last layer)"
RECIPE = RecipeSchema(required=("beta",))


def merge_models(
    task_vectors: TaskVectors,
    depth: Float32[Array, ""],
    alpha: float = 1.0,
    beta: float = 0.4,
    weight: PerExpert = 1.0,
) -> Tensor:
    """Return the sum of the task vectors, scaled by the depth of the layer."""
    scale = alpha / len(task_vectors) + beta * jnp.maximum(depth, 0.0)
    return scale * weighted_sum(task_vectors, weight, normalize=False)
