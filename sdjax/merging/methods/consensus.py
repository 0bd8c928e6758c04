"""Consensus (TALL masks): keep the elements that matter to at least two experts.

Wang et al., "Localizing task information for improved model merging and compression",
arXiv 2405.07813. An element matters to an expert if the sum of the task vectors is closer to the
expert's than the base is, up to the factor `mask_ratio` (λ_t in the paper, which chooses it between
0.2 and 0.6 by validation accuracy): |τ_j| > λ_j |τ_sum - τ_j|. With `min_experts` 2, elements that
matter to one expert ("selfish") or none ("catastrophic") keep the base's value; with 1 only the
latter do.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import weighted_sum

FORMULA = "τ = λ τ_sum where Σ_j 1[|τ_j| > λ_j |τ_sum - τ_j|] >= k, else 0; τ_sum = Σ w_j τ_j"
RECIPE = RecipeSchema(param_names={"scale": "lambda"})


def merge_models(
    task_vectors: TaskVectors,
    mask_ratio: PerExpert = 0.4,
    weight: PerExpert = 1.0,
    scale: float = 0.4,
    min_experts: int = 2,
) -> Tensor:
    """Return the sum of the task vectors where enough experts agree that it matters."""
    total = weighted_sum(task_vectors, weight, normalize=False)
    count = sum(
        (jnp.abs(vector) > mask_ratio[name] * jnp.abs(total - vector)).astype(jnp.float32)
        for name, vector in task_vectors.items()
    )
    return scale * jnp.where(jnp.asarray(count) >= min_experts, total, 0.0)
