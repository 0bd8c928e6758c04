"""Models split into trainable and frozen arrays: full fine-tuning or a LoRA adapter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp

from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import Params

# (trainable, frozen) -> the parameters and the adapter of a forward pass
Assemble: TypeAlias = Callable[[Any, Any], tuple[Params, Adapter | None]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trainable:
    """A model split into trainable and frozen arrays.

    Attributes:
        config: architecture of the model.
        trainable: pytree of float32 arrays, the master weights.
        frozen: pytree of arrays.
        assemble: combines the two; traceable by JAX, and hashable.
    """

    config: ModelConfig
    trainable: Any
    frozen: Any
    assemble: Assemble


def full_finetune(
    config: ModelConfig,
    params: Params,
    *,
    paths: Collection[str] | None = None,
    dtype: Any = jnp.float32,
) -> Trainable:
    """Return a trainable whose parameters are trained directly.

    Float32 tensors are not copied, and training donates them. The trainable and frozen tensors are
    flat dicts from path to array.

    Args:
        config: architecture of the model.
        params: weights of the model.
        paths: tensors to train, all by default.
        dtype: dtype that trained tensors are cast to in the forward pass.
    """
    trainable, frozen = split_params(params, set(flatten(params) if paths is None else paths))
    return Trainable(
        config=config, trainable=trainable, frozen=frozen, assemble=AssembleParams(dtype=dtype)
    )


def lora_finetune(config: ModelConfig, params: Params, adapter: Adapter) -> Trainable:
    """Return a trainable with copies of the adapter's factors; compute uses the `params` dtype."""
    return Trainable(
        config=config,
        trainable=jax.tree.map(jnp.copy, adapter.factors),  # training donates them
        frozen=params,
        assemble=AssembleAdapter(scale=adapter.scale),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssembleParams:
    """Function that joins flat dicts of tensors, casting trainable ones to `dtype` if it is set."""

    dtype: Any = None

    def __call__(self, trainable: dict, frozen: dict) -> tuple[Params, None]:
        """Return the parameters, and no adapter."""
        if self.dtype is not None:
            trainable = {path: leaf.astype(self.dtype) for path, leaf in trainable.items()}
        return unflatten(frozen | trainable), None


@dataclasses.dataclass(frozen=True, kw_only=True)
class AssembleAdapter:
    """Function that combines frozen weights with an adapter of trainable factors."""

    scale: float

    def __call__(self, trainable: dict, frozen: Params) -> tuple[Params, Adapter]:
        """Return the frozen parameters and the adapter."""
        return frozen, Adapter(factors=trainable, scale=self.scale)


def split_params(
    params: Params, trained: Collection[str]
) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Return two flat dicts: the tensors at the `trained` paths, in float32, and all others."""
    leaves = flatten(params)
    trainable = {path: leaf.astype(jnp.float32) for path, leaf in leaves.items() if path in trained}
    return trainable, {path: leaf for path, leaf in leaves.items() if path not in trained}
