"""Subspace Boosting: raise the small singular values of the merged task vector.

Skorobogat, Roth, Georgescu, "Subspace-boosted model merging", arXiv 2506.16506. The more experts
are added, the more a few common directions dominate their sum. The largest singular values that
make up the fraction `beta` of their total are kept, and all others are raised to the last of these
(0 makes all of them equal to the largest). The paper tunes `beta` between 0 and 0.02. Tensors that
are not matrices are added.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import SUBSPACE_CAUTION, RecipeSchema
from sdjax.merging.operations.mixing import weighted_sum

FORMULA = "τ = λ U max(σ, σ_k) Vᵀ, U σ Vᵀ = Σ w_j τ_j, k the first with Σ_{i≤k} σ_i >= β Σ σ_i"
RECIPE = RecipeSchema(param_names={"scale": "lambda"}, unit_interval=("beta",))
CAUTION = SUBSPACE_CAUTION


def merge_models(
    task_vectors: TaskVectors,
    weight: PerExpert = 1.0,
    beta: float = 0.01,
    scale: float = 0.4,
) -> Tensor:
    """Return the sum of the task vectors with its small singular values raised."""
    total = weighted_sum(task_vectors, weight, normalize=False)
    if total.ndim != 2:
        return scale * total
    u, s, vt = jnp.linalg.svd(total, full_matrices=False)
    before = jnp.sum(jnp.cumsum(s) < beta * jnp.sum(s))
    raised = jnp.maximum(s, s[jnp.minimum(before, s.size - 1)])
    return scale * (u * raised) @ vt
