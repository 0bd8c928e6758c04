"""DOGE: add a correction of their interference to all task vectors, outside the shared subspace.

Wei et al., "Modeling multi-task model merging as adaptive projective gradient descent", arXiv
2501.01230 (DOGE TA), as in the code that its authors contributed to FusionBench. Task vectors are
weighted by `eta` divided by their norm. A correction Δ of all of them is found by `steps` steps of
Adam on the squared inner products, row by row, of each task vector with what the merged one lacks
of it. Gradients are projected out of the subspace that the leading left singular vectors of the
experts span together, 1/`subspace` of the full rank. Of each expert the fraction `density` of
largest elements is used; the authors rank the elements of the whole model, here each tensor is
ranked separately. Tensors that are not matrices keep the base's values.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.adam import adam
from sdjax.merging.operations.topk_threshold import topk_masks

FORMULA = (
    "τ = Σ λ_j m_j ⊙ (τ_j + Δ), λ_j = η / |τ_j|, m_j = top_d(τ_j), Δ ≈ argmin_Δ "
    "Σ_j Σ_rows ⟨τ_j, τ_j - Σ_i λ_i (τ_i + Δ)⟩² by gradients projected with I - U Uᵀ"
)
RECIPE = RecipeSchema(unit_interval=("density",))


def merge_models(
    task_vectors: TaskVectors,
    eta: float = 0.07,
    density: PerExpert = 0.3,
    subspace: int = 6,
    steps: int = 400,
    learning_rate: float = 1e-4,
) -> Tensor:
    """Return the weighted sum of the corrected task vectors."""
    vectors = list(task_vectors.values())
    if vectors[0].ndim != 2:
        return jnp.zeros_like(vectors[0])
    norms = [jnp.sqrt(jnp.sum(vector * vector)) for vector in vectors]
    weights = [jnp.where(norm > 0, eta / jnp.where(norm > 0, norm, 1.0), 0.0) for norm in norms]
    weight = jnp.asarray(sum(weights))
    total = sum(w * vector for w, vector in zip(weights, vectors, strict=True))
    shared = _shared_subspace(vectors, subspace)

    def gradient(delta: Tensor) -> Tensor:
        merged = total + weight * delta
        lacking = (jnp.sum(v * (v - merged), axis=1, keepdims=True) * v for v in vectors)
        full = -2 * weight * sum(lacking)
        return full - shared @ (shared.T @ full)

    delta = adam(gradient, jnp.zeros_like(vectors[0]), steps, learning_rate)
    masks = topk_masks(vectors, [density[name] for name in task_vectors])
    terms = zip(weights, masks, vectors, strict=True)
    return jnp.asarray(sum(w * jnp.where(mask, v + delta, 0.0) for w, mask, v in terms))


def _shared_subspace(vectors: list[Tensor], subspace: int) -> jax.Array:
    """Return the leading left singular vectors [out, k] of those of all experts."""
    rank = min(vectors[0].shape)
    own = max(1, rank // len(vectors))
    lefts = [jnp.linalg.svd(vector, full_matrices=False)[0][:, :own] for vector in vectors]
    left, _, _ = jnp.linalg.svd(jnp.concatenate(lefts, axis=1), full_matrices=False)
    return left[:, : rank // max(1, subspace)]
