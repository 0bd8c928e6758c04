"""SVC: lower the singular values to which several experts contribute the same.

Li et al., "When shared knowledge hurts: spectral over-accumulation in model merging",
arXiv 2602.05536 (Singular Value Calibration of task arithmetic). For each left singular vector u of
the merged task vector M, s_j says how much longer uᵀM is than uᵀτ_j, in the direction of the
latter. The singular value is divided by the mean of max(`alpha`, s_j) over the experts. With
`alpha` 1, singular values are only lowered; the paper's experiments use 1/N, which also raises
those that are too small. Tensors that are not matrices are added.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import weighted_sum

FORMULA = (
    "τ = λ U (N σ / Σ_j max(α, s_j)) Vᵀ, U σ Vᵀ = M = Σ w_j τ_j, s_j = ⟨uᵀM, uᵀτ_j⟩ / |uᵀτ_j|²"
)
RECIPE = RecipeSchema(param_names={"scale": "lambda"})


def merge_models(
    task_vectors: TaskVectors,
    weight: PerExpert = 1.0,
    alpha: float = 1.0,
    scale: float = 1.0,
) -> Tensor:
    """Return the sum of the task vectors with calibrated singular values."""
    total = weighted_sum(task_vectors, weight, normalize=False)
    if total.ndim != 2:
        return scale * total
    u, s, vt = jnp.linalg.svd(total, full_matrices=False)
    merged = s[:, None] * vt  # uᵀM of each singular vector
    divisors = []
    for vector in task_vectors.values():
        response = u.T @ vector
        square = jnp.sum(response * response, axis=1)
        ratio = jnp.sum(merged * response, axis=1) / jnp.where(square > 0, square, 1.0)
        divisors.append(jnp.maximum(alpha, ratio))
    return scale * (u * (len(divisors) * s / sum(divisors))) @ vt
