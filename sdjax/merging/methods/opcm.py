"""OPCM: add task vectors one by one, without what lies in the directions merged before.

Tang et al., "Merging models on the fly without retraining: a sequential approach to scalable
continual model merging", arXiv 2501.09522 (Orthogonal Projection-based Continual Merging). In the
basis of the left and right singular vectors of what is merged so far, the diagonal of the next task
vector is removed, and so is its block of the leading singular vectors, those before the first at
which the singular values add up to more than the fraction `alpha` of their total. At last the
result gets the mean norm of the task vectors. Norms are those of single tensors here; in the paper
they are taken over the whole model. The order of the experts matters. Tensors that are not matrices
are added, with the same norm.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema

FORMULA = (
    "τ = mean|τ_j| S_N / |S_N|, S_j = S_{j-1} + U P Vᵀ, P = Uᵀ τ_j V off the block and diagonal"
)
RECIPE = RecipeSchema(unit_interval=("alpha",))


def merge_models(task_vectors: TaskVectors, alpha: float = 0.5) -> Tensor:
    """Return the sum of the projected task vectors, scaled to their mean norm."""
    first, *others = task_vectors.values()
    total = first
    for vector in others:
        total = total + (_projected(vector, total, alpha) if vector.ndim == 2 else vector)
    norms = [_norm(vector) for vector in task_vectors.values()]
    norm = _norm(total)
    scale = jnp.where(norm > 0, sum(norms) / len(norms) / jnp.where(norm > 0, norm, 1.0), 0.0)
    return scale * total


def _projected(vector: Tensor, merged: Tensor, alpha: float) -> Tensor:
    """Return a task vector without its part in the leading directions of the merged one."""
    u, s, vt = jnp.linalg.svd(merged, full_matrices=False)
    block = jnp.sum(jnp.cumsum(s) <= alpha * jnp.sum(s))
    index = jnp.arange(s.size)
    inside = (index[:, None] < block) & (index[None, :] < block)
    removed = jnp.where(inside | (index[:, None] == index[None, :]), u.T @ vector @ vt.T, 0.0)
    return vector - u @ removed @ vt


def _norm(vector: Tensor) -> Tensor:
    # Not jnp.sqrt of zero, whose derivative is infinite.
    square = jnp.sum(vector * vector)
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1.0)), 0.0)
