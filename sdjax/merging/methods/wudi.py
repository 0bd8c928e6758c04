"""WUDI: reduce the interference with each expert, measured along its own task vector.

Cheng et al., "Whoever started the interference should end it: guiding data-free model merging via
task vectors", arXiv 2503.08099. The rows of a linear layer's task vector approximately span its
inputs, so that (τ - τ_j) τ_jᵀ approximates how the outputs for the data of expert j change. The sum
of the squares, relative to |τ_j|², is minimized by `steps` steps of Adam from the sum of the task
vectors, as in the paper. Tensors that are not matrices are averaged.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.adam import adam

FORMULA = "τ ≈ argmin_τ Σ_j |(τ - τ_j) τ_jᵀ|² / |τ_j|²"
RECIPE = RecipeSchema()


def merge_models(
    task_vectors: TaskVectors, steps: int = 300, learning_rate: float = 1e-5
) -> Tensor:
    """Return the task vector that interferes least with the experts' own."""
    vectors = list(task_vectors.values())
    total = jnp.asarray(sum(vectors))
    if total.ndim != 2:
        return total / len(vectors)
    inputs, targets = jnp.zeros(()), jnp.zeros(())
    for vector in vectors:
        square = jnp.sum(vector * vector)
        own = vector.T @ vector / jnp.where(square > 0, square, 1.0)  # [in, in]
        inputs, targets = inputs + own, targets + vector @ own
    return adam(lambda merged: 2 * (merged @ inputs - targets), total, steps, learning_rate)
