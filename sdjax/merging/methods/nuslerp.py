"""NuSLERP: the arc between two experts by weight, over a tensor or over its rows or columns.

mergekit's own method (https://github.com/arcee-ai/mergekit); the arc is that of Shoemake,
"Animating rotation with quaternion curves", SIGGRAPH 1985. The position on the arc is
w_2 / (w_1 + w_2), or the middle if the weights cancel. With a base the arc is around the base,
without one around the origin. Unlike `slerp` it stays on the arc until the two are parallel to the
last bit. If they are nearly opposite the arc is undetermined, and the result is noise, as it is in
mergekit.

`flatten` uses one angle for the tensor; otherwise there is one per row ([out, in]: per output), or
with `row_wise` (mergekit's name) one per column.
"""

from __future__ import annotations

import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert, TaskVectors, Tensor
from sdjax.merging.method import RecipeSchema
from sdjax.merging.operations.geometry import slerp_weights

FORMULA = "τ = (sin((1-t)θ) τ_1 + sin(tθ) τ_2) / sin θ, t = w_2 / (w_1 + w_2)"
RECIPE = RecipeSchema(
    base="optional",
    min_models=2,
    max_models=2,
    param_names={"flatten": "nuslerp_flatten", "row_wise": "nuslerp_row_wise"},
    required=("weight",),
)


def merge_models(
    task_vectors: TaskVectors,
    weight: PerExpert = 1.0,
    flatten: bool = True,
    row_wise: bool = False,
) -> Tensor:
    """Return the point on the arc between two task vectors."""
    if len(task_vectors) != 2:
        raise ValueError("takes exactly two experts")
    (a, b), (first, second) = task_vectors.values(), weight.values()
    total = first + second
    t = jnp.where(jnp.abs(total) < 1e-6, 0.5, second / jnp.where(total == 0, 1.0, total))
    axis = None if flatten else 0 if row_wise else -1
    norms = [jnp.maximum(jnp.sqrt(jnp.sum(v * v, axis, keepdims=True)), 1e-7) for v in (a, b)]
    product = jnp.sum((a / norms[0]) * (b / norms[1]), axis, keepdims=True)
    cosine = jnp.clip(product, -1.0, 1.0)
    weight_a, weight_b = slerp_weights(cosine, t, 1 - cosine * cosine <= 1e-16)
    return weight_a * a + weight_b * b
