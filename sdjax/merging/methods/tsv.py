"""TSV: merge the leading singular vectors of the task matrices, orthogonalized.

Gargiulo et al., "Task singular vectors: reducing task interference in model merging",
arXiv 2412.00081 (TSV-Merge). Each task matrix is truncated to its `rank` largest singular triplets
(with `rank` 0, to all of them divided by the number of experts, as in the paper). The left and the
right vectors of all experts are stacked, each stack is replaced by the nearest orthonormal matrix
(Procrustes), and the product with the singular values is the merged task vector. Tensors that are
not matrices are averaged.
"""

from __future__ import annotations

import math

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import SUBSPACE_CAUTION, RecipeSchema
from sdjax.merging.operations.geometry import nearest_orthonormal

FORMULA = "τ = λ U⊥ Σ V⊥ᵀ, U⊥, V⊥ the nearest orthonormal to the stacked top-r U_j, V_j of τ_j"
RECIPE = RecipeSchema(param_names={"scale": "lambda"})
CAUTION = SUBSPACE_CAUTION


def merge_models(task_vectors: TaskVectors, scale: float = 1.0, rank: int = 0) -> Tensor:
    """Return the merged task vector, built from the leading singular vectors."""
    vectors = list(task_vectors.values())
    if vectors[0].ndim != 2:
        return scale * jnp.asarray(sum(vectors)) / len(vectors)
    full_rank = min(vectors[0].shape)
    kept = min(rank, full_rank) if rank > 0 else max(1, math.floor(full_rank / len(vectors)))
    lefts, values, rights = [], [], []
    for vector in vectors:
        u, s, vt = jnp.linalg.svd(vector, full_matrices=False)
        lefts.append(u[:, :kept])
        values.append(s[:kept])
        rights.append(vt[:kept].T)
    left = nearest_orthonormal(jnp.concatenate(lefts, axis=1))  # [out, k r]
    right = nearest_orthonormal(jnp.concatenate(rights, axis=1))  # [in, k r]
    return scale * (left * jnp.concatenate(values)) @ right.T
