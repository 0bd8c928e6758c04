"""The gradient of a merge in its hyperparameters, as a computation to compile for a trial."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.core.errors import UserError
from sdjax.merging.tensor_program import TensorProgram, TreeProgram
from sdjax.sandbox.gradient import NOT_DIFFERENTIABLE, weighted_sum


@dataclass(frozen=True, kw_only=True)
class GradientProgram:
    """Value and gradient of a weighted sum of merged tensors.

    The executable's arguments are (base, experts, weights of the sum, *inputs), with a tuple of
    bases and of experts for a tree.

    Attributes:
        cache_key: programs with the same cache key share an executable.
        lower: traces and lowers the gradient.
        inputs: those of the merge.
    """

    cache_key: tuple
    lower: Callable[[], jax.stages.Lowered]
    inputs: tuple[Any, ...]


def merge_gradient(
    weights: tuple[Any, Any], merge: TensorProgram | TreeProgram
) -> tuple[tuple[Any, Any, Any], GradientProgram]:
    """Return the gradient of a merge in its hyperparameters, and in nothing else.

    Args:
        weights: shapes of base and experts, or of bases and experts.
        merge: the merge.

    Returns:
        the shapes of the first three arguments, and the computation.
    """
    donated = (None,) if isinstance(merge, TensorProgram) else ()
    (sharding, *_) = (leaf.sharding for leaf in jax.tree.leaves(weights))
    shapes, _ = jax.eval_shape(merge.function, *weights, *merge.inputs, *donated)
    arguments = (
        *weights,
        [
            jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=sharding)
            for x in jax.tree.leaves(shapes)
        ],
    )

    def total(base: Any, experts: Any, factors: Any, *inputs: Any) -> jax.Array:
        merged, _ = merge.function(base, experts, *inputs, *donated)
        return weighted_sum(jax.tree.leaves(merged), factors)

    def lower() -> jax.stages.Lowered:
        gradient = jax.jit(jax.value_and_grad(total, argnums=3))
        try:
            return gradient.lower(*arguments, *merge.inputs)
        except NOT_DIFFERENTIABLE as error:
            raise UserError(f"no gradient: {error}") from error

    return arguments, GradientProgram(
        cache_key=("gradient", *merge.cache_key[1:]), lower=lower, inputs=merge.inputs
    )
