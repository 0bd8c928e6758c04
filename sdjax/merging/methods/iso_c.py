"""ISO-C: the sum of the task vectors with all singular values made equal.

Marczak et al., "No task left behind: isotropic model merging with common and task-specific
subspaces", arXiv 2502.04959 (Iso-C). The singular values of the sum are replaced by their mean.
Tensors that are not matrices are averaged. `scale` is the paper's α.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import SUBSPACE_CAUTION, RecipeSchema
from sdjax.merging.operations.geometry import nearest_orthonormal

FORMULA = "τ = λ mean(σ) U Vᵀ, U σ Vᵀ = Σ τ_j"
RECIPE = RecipeSchema(param_names={"scale": "lambda"})
CAUTION = SUBSPACE_CAUTION


def merge_models(task_vectors: TaskVectors, scale: float = 1.0) -> Tensor:
    """Return the sum of the task vectors with equal singular values."""
    total = jnp.asarray(sum(task_vectors.values()))
    if total.ndim != 2:
        return scale * total / len(task_vectors)
    polar = nearest_orthonormal(total)
    # The inner product with U Vᵀ equals the sum of the singular values.
    return scale * jnp.sum(polar * total) / min(total.shape) * polar
