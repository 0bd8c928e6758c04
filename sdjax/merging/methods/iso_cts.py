"""ISO-CTS: ISO-C, with the weakest common directions replaced by directions of single experts.

Marczak et al., "No task left behind: isotropic model merging with common and task-specific
subspaces", arXiv 2502.04959 (Iso-CTS). The leading singular vectors of the sum, about the fraction
`common_fraction` of them (0.8 in the paper), form the common subspace. Each expert adds the leading
singular vectors of what its task vector has outside of it, the same number for every expert. All
left and all right vectors are orthogonalized, and all singular values become their mean. Tensors
that are not matrices are averaged. `scale` is the paper's α. The merge is not differentiable in the
weights.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.geometry import forbid_gradient, nearest_orthonormal

FORMULA = "τ = λ mean(σ) U⊥ V⊥ᵀ, U, σ, V: top-k of Σ τ_j and top-s of (I - U_k U_kᵀ) τ_j for each j"
RECIPE = RecipeSchema(param_names={"scale": "lambda"}, unit_interval=("common_fraction",))


def merge_models(
    task_vectors: TaskVectors, scale: float = 1.0, common_fraction: float = 0.8
) -> Tensor:
    """Return the matrix of equal singular values over common and task-specific directions."""
    vectors = list(task_vectors.values())
    if vectors[0].ndim != 2:
        return scale * jnp.asarray(sum(vectors)) / len(vectors)
    reason = "in iso_cts the singular vectors outside of the common subspace are not unique"
    vectors = [forbid_gradient(vector, reason) for vector in vectors]
    total = jnp.asarray(sum(vectors))
    count, rank = len(vectors), min(total.shape)
    # In float32 a fraction such as 0.7 is slightly too small, which must not change the floor.
    common = jnp.floor(common_fraction * rank * (1 + 2**-22))
    own = jnp.round((rank - common) / count).astype(jnp.int32)  # directions of each expert
    own = jnp.clip(own, 0, rank // count)
    u, s, vt = jnp.linalg.svd(total, full_matrices=False)
    inside = jnp.where(jnp.arange(rank) < rank - own * count, u, 0.0)
    parts = [
        jnp.linalg.svd(vector - inside @ (inside.T @ vector), full_matrices=False)
        for vector in vectors
    ]
    # The directions of each expert, then the common ones; their numbers may be traced.
    column = jnp.arange(rank)
    safe = jnp.maximum(own, 1)
    chosen = jnp.where(
        column < own * count,
        column // safe * rank + column % safe,
        count * rank + column - own * count,
    )
    left = jnp.concatenate([*(part[0] for part in parts), u], axis=1)[:, chosen]
    right = jnp.concatenate([*(part[2] for part in parts), vt], axis=0)[chosen]
    values = jnp.concatenate([*(part[1] for part in parts), s])[chosen]
    return scale * jnp.mean(values) * nearest_orthonormal(left) @ nearest_orthonormal(right)
