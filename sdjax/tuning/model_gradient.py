"""Gradient of a model's loss in some of its tensors, shared by all merges of the same models.

    (tensors in scope, others, parts of a batch) -> loss, d loss / d tensors in scope

Whatever is tuned, the merged tensors are arguments, so one executable serves all programs and
families of a run. It loops over the parts of its batch and accumulates their gradients in float32,
so that activations exist for one part at a time: XLA for CPUs drops the barriers of
`jax.checkpoint`, which elsewhere recompute each layer in the backward pass.

Memory: in addition to activations, n elements in scope take 4n bytes for the gradient, as many as
the compute dtype has for that of the current part, and as many for a copy in the compute dtype if
they are stored in another.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from sdjax.merging.tensor_program import replicated
from sdjax.models.config import ModelConfig
from sdjax.training.fit import rematerialize
from sdjax.training.sft import sft_loss
from sdjax.training.types import Batch

Tensors = Mapping[str, jax.Array]


@dataclass(frozen=True, kw_only=True)
class ModelGradient:
    """Loss of a model on a batch, and its gradient in the tensors in scope.

    The executable's arguments are (scope, others, parts), two dicts from path to tensor and a list
    of batches of equal shapes. It returns the mean negative log-likelihood of all their target
    tokens, and a dict from path to gradient: float32, with the sharding of the tensor.

    Attributes:
        cache_key: gradients with the same cache key share an executable.
        lower: traces and lowers the computation.
    """

    cache_key: tuple
    lower: Callable[[], jax.stages.Lowered]

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        scope: Tensors,
        others: Tensors,
        parts: Sequence[Batch],
        *,
        compute_dtype: DTypeLike,
    ) -> ModelGradient:
        """Describe the gradient.

        Args:
            config: architecture of the model.
            scope: the tensors in which the loss is differentiated, or their shapes.
            others: all other tensors of the model.
            parts: parts of a batch; see `sdjax.training.data.target_batches`.
            compute_dtype: dtype of activations and of all tensors in the forward pass.
        """
        dtype = jnp.dtype(compute_dtype)
        loss = rematerialize(sft_loss(config))

        def step(scope: Any, others: Any, parts: list[Batch]) -> tuple[jax.Array, Any]:
            scope, others = jax.tree.map(lambda x: x.astype(dtype), (scope, others))
            stacked = jax.tree.map(lambda *arrays: jnp.stack(arrays), *parts)
            total = jnp.maximum(jnp.sum(stacked["weights"]), 1.0)

            def weighted_loss(scope: Any, part: Batch) -> jax.Array:
                mean, metrics = loss(scope, others, part)
                return mean * metrics["tokens"] / total

            def add(carry: Any, part: Batch) -> tuple[Any, None]:
                found = jax.value_and_grad(weighted_loss)(scope, part)
                return jax.tree.map(lambda x, y: x + y.astype(jnp.float32), carry, found), None

            zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), scope)
            return jax.lax.scan(add, (jnp.float32(0), zeros), stacked)[0]

        def lower() -> jax.stages.Lowered:
            shardings = {path: x.sharding for path, x in scope.items()}
            scalar = replicated(next(iter(shardings.values())))
            return jax.jit(step, out_shardings=(scalar, shardings)).lower(scope, others, parts)

        leaves, structure = jax.tree.flatten((scope, others, list(parts)))
        shapes = tuple((x.shape, x.dtype.name, getattr(x, "sharding", None)) for x in leaves)
        return cls(cache_key=("model gradient", config, dtype.name, structure, shapes), lower=lower)
