"""NearSwap: move to the other model where the two are near each other already.

alchemonaut's method (https://huggingface.co/alchemonaut/QuartetAnemoi-70B-t0.0001) as mergekit has
it; no paper. An element is swapped wholly where it differs by at most ``t``, and by the share
t / |difference| elsewhere.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.method import RecipeSchema

FORMULA = "τ = min(1, t / |τ_1|) τ_1"
RECIPE = RecipeSchema(min_models=1, max_models=1, required=("t",))


def merge_models(task_vectors: dict[str, jax.Array], t: float = 1e-4) -> jax.Array:
    if len(task_vectors) != 1:
        raise ValueError("nearswap takes exactly one expert")
    (vector,) = task_vectors.values()
    return jnp.clip(t / jnp.maximum(jnp.abs(vector), 1e-6), 0.0, 1.0) * vector
