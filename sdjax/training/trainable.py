"""What is trained: a model's own tensors, or an adapter beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.tree import flatten, unflatten

# (trainable, frozen) -> the weights and the adapter that a forward pass takes
Assemble = Callable[[Any, Any], tuple[dict, Adapter | None]]


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class Trainable:
    """A model, divided into what a training changes and what it reads.

    Attributes:
        trainable: a pytree of float32 arrays: the master weights.
        frozen: a pytree of arrays.
        assemble: puts the two together, traceable by JAX.
    """

    config: ModelConfig
    trainable: Any
    frozen: Any
    assemble: Assemble


def full_finetune(
    config: ModelConfig,
    params: dict,
    *,
    paths: Collection[str] | None = None,
    dtype: Any = jnp.float32,
) -> Trainable:
    """Trains the tensors at `paths`, all by default, and computes with them in `dtype`.

    What is float32 already is taken over, not copied, and consumed by the training. The trained
    and the frozen tensors are flat dicts from path to tensor.
    """
    trainable, frozen = split(params, set(flatten(params) if paths is None else paths))
    return Trainable(
        config=config, trainable=trainable, frozen=frozen, assemble=as_tensors(dtype=dtype)
    )


def lora_finetune(config: ModelConfig, params: dict, adapter: Adapter) -> Trainable:
    """Trains the factors of an adapter; the computation is in the weights' dtype."""
    return Trainable(
        config=config,
        trainable=jax.tree.map(jnp.copy, adapter.factors),  # training consumes them
        frozen=params,
        assemble=as_factors(scale=adapter.scale),
    )


def as_tensors(*, dtype: Any = None) -> Assemble:
    """Flat dicts of trained and frozen tensors as a model; the trained are cast to `dtype`."""

    def assemble(trainable: dict, frozen: dict) -> tuple[dict, None]:
        if dtype is not None:
            trainable = {path: leaf.astype(dtype) for path, leaf in trainable.items()}
        return unflatten(frozen | trainable), None

    return assemble


def as_factors(*, scale: float) -> Assemble:
    """The weights with an adapter of these factors."""

    def assemble(trainable: dict, frozen: dict) -> tuple[dict, Adapter]:
        return frozen, Adapter(factors=trainable, scale=scale)

    return assemble


def split(params: dict, trained: set[str]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The tensors to train, in float32, and the rest, both as flat dicts."""
    leaves = flatten(params)
    trainable = {path: leaf.astype(jnp.float32) for path, leaf in leaves.items() if path in trained}
    return trainable, {path: leaf for path, leaf in leaves.items() if path not in trained}
