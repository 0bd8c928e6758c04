"""The plan of a merge: one step per tensor of the result.

A step knows its source tensors, its algorithm with the hyperparameters that apply to this tensor,
and the program to compile.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.recipe.source_models import SourceModel
from sdjax.merging.recipe.tokenizer_plan import TokenizerPlan
from sdjax.merging.tensor_program import TensorProgram
from sdjax.models.tensor_names import parse_name
from sdjax.sharding.mesh import make_mesh


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """A tensor of a source model."""

    model: SourceModel
    name: str


@dataclass(frozen=True, kw_only=True, eq=False)
class MergeStep:
    """One tensor of the result.

    Attributes:
        name: its name in the result.
        path: its path, which determines random keys, `depth` and `kind`.
        spec: its shape and dtype.
        sources: the tensors that are read: the base, if there is one, and the experts; or a single
            tensor to copy.
        has_base: whether the first source is a base that task vectors are relative to.
        algorithm: the algorithm, or None to copy the source.
        program: the merge to compile, with its inputs; None for the tree form or a copy.
        row_maps: for vocabulary tensors that have to be aligned, each source's row per token.
        fallback: index among the sources of the recipe's base, which fills in missing rows.
        array: the values, if they have been merged in memory already.
    """

    name: str
    path: str
    spec: jax.ShapeDtypeStruct
    sources: tuple[TensorRef, ...]
    has_base: bool = False
    algorithm: Algorithm | None = None
    program: TensorProgram | None = None
    row_maps: tuple[np.ndarray, ...] | None = None
    fallback: int | None = None
    array: np.ndarray | None = None


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Plan of a merge from disk to disk.

    Attributes:
        steps: one step per tensor, in the order of the result's files.
        template: source of the result's config and, by default, of its tokenizer.
        layers: for each layer of the result, its template: a source model and a layer number, from
            which it takes tensor names and per-layer config entries.
        models: all source models.
        tokenizer: the tokenizer of the result.
        key: typed PRNG key, or None if nothing is random.
        slots: names of the experts, or None for expert_1 ... expert_k.
    """

    steps: tuple[MergeStep, ...]
    template: SourceModel
    layers: tuple[tuple[SourceModel, int], ...]
    models: tuple[SourceModel, ...]
    tokenizer: TokenizerPlan
    key: jax.Array | None
    slots: tuple[str, ...] | None = None


def plan_algorithm(
    algorithm: Algorithm,
    base: SourceModel,
    experts: Mapping[str, SourceModel],
    scope: Sequence[str],
    key: jax.Array,
) -> MergePlan:
    """Plan the merge of the tensors in scope by one algorithm; the others are copied from the base.

    Args:
        algorithm: the algorithm.
        base: the base model, which is also the template of the result.
        experts: slot to model.
        scope: tensor paths.
        key: typed PRNG key, if the algorithm is random.

    Raises:
        UserError: an expert lacks a tensor or has one with a different shape.
    """
    in_scope, slots = set(scope), tuple(experts)
    steps = []
    for name in base.tensor_names():
        info, place = base.info[name], parse_name(name)
        sources = [TensorRef(model=base, name=name)]
        merged, program = place.path in in_scope and math.prod(info.shape) > 0, None
        if merged:
            for expert in experts.values():
                if name not in expert.info:
                    raise missing_tensor(expert, name, base)
                sources.append(TensorRef(model=expert, name=name))
                if expert.info[name].shape != info.shape:
                    raise shape_error(sources[-1], sources[0])
        if merged and algorithm.form == "tensor":
            first, *others = (
                jax.ShapeDtypeStruct(
                    info.shape, ref.model.info[name].dtype, sharding=tensor_sharding(info.shape)
                )
                for ref in sources
            )
            program = TensorProgram.of(
                algorithm,
                slots,
                first,
                tuple(others),
                path=place.path,
                depth=place.depth(len(base.layers)),
                key=key,
            )
        steps.append(
            MergeStep(
                name=name,
                path=place.path,
                spec=jax.ShapeDtypeStruct(info.shape, info.dtype),
                sources=tuple(sources),
                has_base=merged,
                algorithm=algorithm if merged else None,
                program=program,
            )
        )
    return MergePlan(
        steps=tuple(steps),
        template=base,
        layers=tuple((base, layer) for layer in range(len(base.layers))),
        models=(base, *experts.values()),
        tokenizer=TokenizerPlan(folder=base.folder, new_tokens={}, vocabulary=None),
        key=key if "key" in algorithm.requests else None,
        slots=slots,
    )


def missing_tensor(model: SourceModel, name: str, reference: SourceModel) -> UserError:
    """Return the error for a tensor that a model lacks."""
    return UserError(f"{model.folder} lacks tensor {name}, which is in {reference.folder}")


def shape_error(ref: TensorRef, reference: TensorRef) -> UserError:
    """Return the error for a tensor whose shape differs from the reference's."""
    shape, expected = (r.model.info[r.name].shape for r in (ref, reference))
    return UserError(
        f"tensor {ref.name} has shape {list(shape)} in {ref.model.folder}, "
        f"{list(expected)} in {reference.model.folder}"
    )


@cache
def tensor_sharding(shape: tuple[int, ...]) -> jax.sharding.Sharding:
    """Return a sharding over all devices along the first axis divisible by their number."""
    devices = jax.devices()
    if len(devices) == 1:
        return SingleDeviceSharding(devices[0])
    mesh = make_mesh({"fsdp": len(devices)})
    for axis, size in enumerate(shape):
        if size % len(devices) == 0:
            return NamedSharding(mesh, PartitionSpec(*(None,) * axis, "fsdp"))
    return NamedSharding(mesh, PartitionSpec())
