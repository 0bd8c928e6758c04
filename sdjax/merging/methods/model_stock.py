"""Model Stock: the average of the experts, pulled toward the base the more they disagree.

Jang, Yun, Han, "Model Stock: all we need is just a few fine-tuned models", arXiv 2403.19522. The
paper assumes the same angle between all experts; as in mergekit it is estimated by the mean cosine
over all pairs, and if the estimate is singular (the experts cancel) the base is kept. `filter_wise`
uses one angle per row instead of one per tensor.
"""

from __future__ import annotations

import itertools

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.xla.reductions import sums

FORMULA = "τ = N c / (1 + (N-1) c) · mean_j τ_j, c = mean over pairs of cos(τ_i, τ_j)"
RECIPE = RecipeSchema(min_models=2)


def merge_models(task_vectors: TaskVectors, filter_wise: bool = False) -> Tensor:
    """Return the average of the task vectors, scaled by their agreement."""
    vectors = list(task_vectors.values())
    count = len(vectors)
    if count < 2:
        raise ValueError("takes at least two experts")
    pairs = list(itertools.combinations_with_replacement(range(count), 2))
    products = [vectors[i] * vectors[j] for i, j in pairs]
    if filter_wise:
        inner_products = [jnp.sum(product, axis=-1, keepdims=True) for product in products]
    else:
        inner_products = sums(products)
    inner = dict(zip(pairs, inner_products, strict=True))
    norms = [jnp.sqrt(inner[i, i]) for i in range(count)]
    cosines = [
        jnp.clip(inner[i, j] / jnp.maximum(norms[i] * norms[j], 1e-6), -1.0, 1.0)
        for i, j in itertools.combinations(range(count), 2)
    ]
    cosine = sum(cosines) / len(cosines)
    divisor = 1 + (count - 1) * cosine
    singular = jnp.abs(divisor) < 1e-6
    ratio = jnp.where(singular, 0.0, count * cosine / jnp.where(singular, 1.0, divisor))
    return jnp.asarray(ratio * sum(vectors) / count)
