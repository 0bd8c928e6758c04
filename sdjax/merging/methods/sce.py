"""SCE: select the elements that vary, weigh the experts by their size, erase minority signs.

Wan et al., "FuseChat: knowledge fusion of chat models", arXiv 2408.07990. ``select_topk`` is the
share, of the elements on which the experts differ at all, whose variance over the experts is
largest (the paper: 10 %); an expert's weight is its share of the sum of squares of what was
selected. As in mergekit the sum is divided, per element, by the weights that took part;
``normalize=False`` leaves it as the paper writes it.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._mixing import sign_agreement
from sdjax.merging.reductions import counts, reproducible_sum, sums
from sdjax.merging.topk_threshold import kth_largest_magnitudes

FORMULA = (
    "τ = Σ_{j∈A} η_j s_j / Σ_{j∈A} η_j, s_j = τ_j where Var_j τ_j is in its top k, η_j ∝ |s_j|²"
)
RECIPE = RecipeSchema(defaults={"select_topk": 1.0}, unit_interval=("select_topk",))


def merge_models(
    task_vectors: dict[str, jax.Array], select_topk: float = 0.1, normalize: bool = True
) -> jax.Array:
    vectors = list(task_vectors.values())
    mean = sum(vectors) / len(vectors)
    variance = reproducible_sum([(v - mean) * (v - mean) for v in vectors]) / len(vectors)
    (varying,) = counts([variance > 0])
    count = jnp.floor(select_topk * varying.astype(jnp.float32) * (1 + 2**-22)).astype(jnp.int32)
    (least,) = kth_largest_magnitudes(variance, count[None])
    select = (variance >= least) | (jnp.asarray(select_topk) >= 1)
    chosen = {name: jnp.where(select, v, 0.0) for name, v in task_vectors.items()}
    found = sums([v * v for v in chosen.values()])
    squares = {name: s / vectors[0].size for name, s in zip(chosen, found, strict=True)}
    total = jnp.asarray(sum(squares.values()))
    tiny = total < 1e-6
    weight = {
        name: jnp.where(tiny, 1.0 / len(vectors), square / jnp.where(tiny, 1.0, total))
        for name, square in squares.items()
    }
    agrees = sign_agreement(chosen)
    merged = sum(jnp.where(agrees[name], weight[name] * v, 0.0) for name, v in chosen.items())
    if normalize:
        taking_part = sum(jnp.where(agrees[name], weight[name], 0.0) for name in chosen)
        merged = merged / jnp.maximum(taking_part, 1e-6)
    return jnp.asarray(merged)
