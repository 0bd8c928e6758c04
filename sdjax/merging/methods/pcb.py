"""PCB: weight every element by its importance within its expert and its agreement with the others.

Du et al., "Parameter competition balancing for model merging", arXiv 2410.02396, as in the authors'
code. The score of an element is exp(N s²) tanh(τ_j Σ τ_i), s its magnitude within the tensor scaled
to [0, 1]. Of each expert the fraction `density` of elements with the highest scores is kept, with
weights that grow linearly from the lowest of these scores (0) to the highest (1). Magnitudes are
clipped to their 0.0001 and 0.9999 quantiles. The authors rank the elements of the whole model; here
each tensor is ranked separately.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.topk_threshold import kth_largest_magnitudes
from sdjax.xla.reductions import count_true

FORMULA = (
    "τ = λ Σ β_j τ_j / Σ β_j, β_j ∝ max(0, b_j - top_d(b_j)), b_j = exp(N s_j²) tanh(τ_j Σ τ_i)"
)
RECIPE = RecipeSchema(param_names={"scale": "lambda"}, unit_interval=("density",))
_OUTLIERS = 1e-4  # fraction clipped at either end


def merge_models(task_vectors: TaskVectors, density: float = 0.1, scale: float = 1.0) -> Tensor:
    """Return the task vectors averaged by their scores."""
    total = sum(task_vectors.values())
    numerator, divisor = jnp.zeros(()), jnp.zeros(())
    for vector in task_vectors.values():
        clipped, importance = _clipped(vector)
        score = jnp.exp(len(task_vectors) * importance * importance) * jnp.tanh(vector * total)
        weight = _scaled_above(score, density)
        numerator, divisor = numerator + weight * clipped, divisor + weight
    return scale * numerator / jnp.maximum(divisor, 1e-12)


def _clipped(vector: Tensor) -> tuple[Tensor, Tensor]:
    """Return the vector with clipped magnitudes, and these scaled to [0, 1]."""
    size = vector.size
    lowest, highest = size - int(size * _OUTLIERS), size - int(size * (1 - _OUTLIERS) - 1)
    low, high = kth_largest_magnitudes(vector, jnp.array([lowest, highest]))
    magnitude = jnp.clip(jnp.abs(vector), low, high)
    return jnp.sign(vector) * magnitude, _scaled(magnitude, low, high)


def _scaled_above(score: Tensor, density: jax.Array | float) -> Tensor:
    """Scale the fraction `density` of highest scores to [0, 1]; the others become 0."""
    # In float32 a fraction such as 0.9 is slightly too small, which must not change the floor.
    rank = jnp.floor((1.0 - density) * score.size * (1 + 2**-22)).astype(jnp.int32)
    low = _kth_largest(score, score.size - jnp.minimum(rank, score.size - 1))
    return _scaled(jnp.maximum(score, low), low, jnp.max(score))


def _kth_largest(x: Tensor, k: jax.Array) -> jax.Array:
    """Return the k-th largest element, of either sign, counted from 1."""
    (positive,) = count_true([x >= 0])
    (above,) = kth_largest_magnitudes(jnp.maximum(x, 0.0), k[None])
    (below,) = kth_largest_magnitudes(jnp.minimum(x, 0.0), (x.size - k + 1)[None])
    return jnp.where(k <= positive, above, -below)


def _scaled(x: Tensor, low: jax.Array, high: jax.Array) -> Tensor:
    return jnp.where(high > low, (x - low) / jnp.where(high > low, high - low, 1.0), 0.0)
