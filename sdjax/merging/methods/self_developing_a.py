"""Self-Developing: the best algorithm discovered in its paper (Eq. 6).

Ishibashi, Yano, Oyamada, "Can large language models invent algorithms to improve themselves?",
arXiv 2410.15639. For each expert in order, the merged task vector is halved and half the row mean
of the expert's task vector, broadcast over the row, is added.

The authors published the equation but no code. Two choices are ours: the sum starts at zero, and a
row is one output feature (the mean runs over the last axis of [out, in]). `rate` is the paper's one
half.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema

FORMULA = "τ ← (1-r) τ + r · rowmean(τ_j) for j = 1..k, from τ = 0"
RECIPE = RecipeSchema()


def merge_models(task_vectors: TaskVectors, rate: float = 0.5) -> Tensor:
    """Return the running average of the experts' row means."""
    merged = jnp.zeros_like(next(iter(task_vectors.values())))
    for vector in task_vectors.values():
        row_mean = jnp.mean(vector, axis=-1 if vector.ndim else (), keepdims=True)  # [out, 1]
        merged = (1 - rate) * merged + rate * row_mean
    return merged
