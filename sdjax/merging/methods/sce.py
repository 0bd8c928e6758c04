"""SCE: select elements by variance, weight experts by energy, erase minority signs.

Wan et al., "FuseChat: knowledge fusion of chat models", arXiv 2408.07990. Among the elements on
which the experts differ, the fraction `select_topk` with the largest variance over the experts is
selected (10% in the paper). An expert's weight is its share of the sum of squares of the selected
elements. As in mergekit the sum is divided, per element, by the sum of the participating weights;
`normalize=False` is the paper's form. `keep_ties`: as in `ties`.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.mixing import sign_agreement
from sdjax.merging.operations.topk_threshold import largest_mask
from sdjax.xla.reductions import count_true, reproducible_sum, sums

FORMULA = (
    "τ = Σ_{j∈A} η_j s_j / Σ_{j∈A} η_j, s_j = τ_j where Var_j τ_j is in its top k, η_j ∝ |s_j|²"
)
RECIPE = RecipeSchema(defaults={"select_topk": 1.0}, unit_interval=("select_topk",))


def merge_models(
    task_vectors: TaskVectors,
    select_topk: float = 0.1,
    normalize: bool = True,
    keep_ties: bool = False,
) -> Tensor:
    """Return the weighted sum of the selected elements."""
    vectors = list(task_vectors.values())
    mean = sum(vectors) / len(vectors)
    variance = reproducible_sum([(v - mean) * (v - mean) for v in vectors]) / len(vectors)
    (varying,) = count_true([variance > 0])
    count = jnp.floor(select_topk * varying.astype(jnp.float32) * (1 + 2**-22)).astype(jnp.int32)
    select = largest_mask(variance, count, keep_ties=keep_ties)
    select |= jnp.asarray(select_topk) >= 1
    selected = {name: jnp.where(select, v, 0.0) for name, v in task_vectors.items()}
    energies = sums([v * v for v in selected.values()])
    squares = {name: s / vectors[0].size for name, s in zip(selected, energies, strict=True)}
    total = jnp.asarray(sum(squares.values()))
    tiny = total < 1e-6
    weight = {
        name: jnp.where(tiny, 1.0 / len(vectors), square / jnp.where(tiny, 1.0, total))
        for name, square in squares.items()
    }
    agrees = sign_agreement(selected)
    merged = sum(jnp.where(agrees[name], weight[name] * v, 0.0) for name, v in selected.items())
    if normalize:
        divisor = sum(jnp.where(agrees[name], weight[name], 0.0) for name in selected)
        merged = merged / jnp.maximum(divisor, 1e-6)
    return jnp.asarray(merged)
