"""NuSLERP: the arc between two experts, by weights, over the tensor or over its rows or columns.

mergekit's own method (https://github.com/arcee-ai/mergekit); the arc is Shoemake's, "Animating
rotation with quaternion curves", SIGGRAPH 1985. The place on the arc is w_2 / (w_1 + w_2), or the
middle where the weights cancel. Against a base it runs around the base, without one around the
origin. Unlike ``slerp`` it stays on the arc until the two are parallel to the last bit; of experts
that nearly oppose each other the arc is not determined, and the result, as mergekit's, is noise.

``flatten``: one angle for the tensor. Without it one for each row ([out, in]: each output), and
with ``row_wise`` one along the first axis instead (mergekit's name; each input).
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.merging.algorithm import PerExpert
from sdjax.merging.method import RecipeSchema
from sdjax.merging.methods._geometry import slerp_weights

FORMULA = "τ = (sin((1-t)θ) τ_1 + sin(tθ) τ_2) / sin θ, t = w_2 / (w_1 + w_2)"
RECIPE = RecipeSchema(
    base="optional",
    min_models=2,
    max_models=2,
    param_names={"flatten": "nuslerp_flatten", "row_wise": "nuslerp_row_wise"},
    required=("weight",),
)


def merge_models(
    task_vectors: dict[str, jax.Array],
    weight: PerExpert = 1.0,
    flatten: bool = True,
    row_wise: bool = False,
) -> jax.Array:
    if len(task_vectors) != 2:
        raise ValueError("nuslerp needs exactly two experts")
    (a, b), (first, second) = task_vectors.values(), weight.values()
    total = first + second
    t = jnp.where(jnp.abs(total) < 1e-6, 0.5, second / jnp.where(total == 0, 1.0, total))
    axis = None if flatten else 0 if row_wise else -1
    lengths = [jnp.maximum(jnp.sqrt(jnp.sum(v * v, axis, keepdims=True)), 1e-7) for v in (a, b)]
    product = jnp.sum((a / lengths[0]) * (b / lengths[1]), axis, keepdims=True)
    cosine = jnp.clip(product, -1.0, 1.0)
    share, other = slerp_weights(cosine, t, 1 - cosine * cosine <= 1e-16)
    return share * a + other * b
