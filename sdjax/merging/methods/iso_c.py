"""ISO-C: the sum of the task vectors with all its singular values made equal.

Marczak et al., "No task left behind: isotropic model merging with common and task-specific
subspaces", arXiv 2502.04959 (Iso-C). The singular values of the sum are replaced by their mean.
Tensors that are no matrix are averaged. ``scale`` is the paper's α.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._spectral import nearest_orthonormal

FORMULA = "τ = λ mean(σ) U Vᵀ, U σ Vᵀ = Σ τ_j"
RECIPE = RecipeSchema(param_names={"scale": "lambda"})


def merge_models(task_vectors: dict[str, jax.Array], scale: float = 1.0) -> jax.Array:
    total = jnp.asarray(sum(task_vectors.values()))
    if total.ndim != 2:
        return scale * total / len(task_vectors)
    turned = nearest_orthonormal(total)
    # The inner product with U Vᵀ is the sum of the singular values.
    return scale * jnp.sum(turned * total) / min(total.shape) * turned
