"""The plan of a merge: one step per tensor of the result.

A step knows its source tensors, its algorithm with the hyperparameters that apply to this tensor,
and the program to compile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from sdjax.core.errors import UserError
from sdjax.io.safetensors_writer import DTYPES
from sdjax.io.tensor_reader import TensorInfo, narrowed
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.recipe.source_models import (
    EMBEDDING,
    OUTPUT,
    SourceModel,
)
from sdjax.merging.recipe.tokenizer_plan import TokenizerPlan
from sdjax.merging.tensor_program import TensorProgram, check_layers
from sdjax.models.tensor_names import layer_depths, parse_name
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
        last: source of the tensors after the last layer.
        models: all source models.
        tokenizer: the tokenizer of the result.
        key: typed PRNG key, or None if nothing is random.
        slots: names of the experts, or None for expert_1 ... expert_k.
        scope: the tensors to merge, as the user named them, or None for all of them.
        notes: remarks for the user.
    """

    steps: tuple[MergeStep, ...]
    template: SourceModel
    layers: tuple[tuple[SourceModel, int], ...]
    last: SourceModel
    models: tuple[SourceModel, ...]
    tokenizer: TokenizerPlan
    key: jax.Array | None
    slots: tuple[str, ...] | None = None
    scope: str | None = None
    notes: tuple[str, ...] = ()

    @property
    def num_merged(self) -> int:
        """Number of tensors that are merged rather than copied."""
        return sum(step.algorithm is not None or step.array is not None for step in self.steps)

    @property
    def coverage(self) -> str:
        """How many tensors are merged, and how many are copied."""
        merged, total = self.num_merged, len(self.steps)
        if merged == total:
            return f"merged all {total} tensors"
        scope = "" if self.scope is None else f" (scope {self.scope})"
        source = self.template.name if self.slots is None else "the base"
        return f"merged {merged} of {total} tensors{scope}; {total - merged} copied from {source}"


def plan_algorithm(
    algorithm: Algorithm,
    base: SourceModel,
    experts: Mapping[str, SourceModel],
    paths: Sequence[str],
    key: jax.Array,
    *,
    scope: str | None = None,
    notes: Sequence[str] = (),
) -> MergePlan:
    """Plan the merge of the tensors in scope by one algorithm; the others are copied from the base.

    Args:
        algorithm: the algorithm.
        base: the base model, which is also the template of the result.
        experts: slot to model.
        paths: paths of the tensors in scope.
        key: typed PRNG key, if the algorithm is random.
        scope: the scope as the user named it.
        notes: remarks for the user.

    Raises:
        UserError: an expert lacks a tensor or has one with a different shape, or the algorithm
            requests `depth` and no layer is recognized.
    """
    in_scope, slots = set(paths), tuple(experts)
    check_layers(algorithm, [parse_name(path) for path in paths])
    depths = layer_depths(parse_name(name) for name in base.tensor_names())
    steps: list[MergeStep] = []
    buffers: list[list[TensorRef]] = []
    for name in base.tensor_names():
        info, place = base.info[name], parse_name(name)
        sources = [TensorRef(model=base, name=name)]
        merged, program = place.path in in_scope and is_mergeable(info), None
        own = algorithm.at(place.spellings[-1], depths[place.path]) if merged else None
        if merged:
            for expert in experts.values():
                sources.append(tensor_in(expert, name, base))
                if expert.info[sources[-1].name].shape != info.shape:
                    error = shape_error(sources[-1], sources[0])
                    if name in base.vocabulary_tensors:
                        raise UserError(
                            f"{error}: the vocabularies differ; narrow --scope, such as to mlp, or "
                            "merge by a recipe, which matches rows by token"
                        )
                    raise error
        elif not is_floating(info):
            refs = [TensorRef(model=e, name=name) for e in experts.values() if name in e.info]
            buffers.append([*sources, *refs])
        if own is not None and own.form == "tensor":
            first, *others = (
                jax.ShapeDtypeStruct(
                    info.shape,
                    narrowed(ref.model.info[ref.name].dtype),
                    sharding=tensor_sharding(info.shape),
                )
                for ref in sources
            )
            program = TensorProgram.of(
                own,
                slots,
                first,
                tuple(others),
                path=place.path,
                depth=depths[place.path],
                key=key,
            )
        steps.append(
            MergeStep(
                name=name,
                path=place.path,
                spec=jax.ShapeDtypeStruct(info.shape, info.dtype),
                sources=tuple(sources),
                has_base=merged,
                algorithm=own,
                program=program,
            )
        )
    return MergePlan(
        steps=tuple(steps),
        template=base,
        layers=tuple((base, layer) for layer in range(len(base.layers))),
        last=base,
        models=(base, *experts.values()),
        tokenizer=TokenizerPlan(folder=base.folder, new_tokens={}, vocabulary=None),
        key=key if "key" in algorithm.requests else None,
        slots=slots,
        scope=scope,
        notes=(
            *notes,
            *(note for model in (base, *experts.values()) for note in model.notes),
            *unused_tensors(base, experts.values()),
            *different_buffers(buffers),
        ),
    )


def is_floating(info: TensorInfo) -> bool:
    """Return whether a tensor holds weights, and not a buffer such as position ids or a mask."""
    return info.dtype in DTYPES.values()


def is_mergeable(info: TensorInfo) -> bool:
    """Return whether there is anything to compute for a tensor."""
    return is_floating(info) and math.prod(info.shape) > 0


def tensor_in(model: SourceModel, name: str, reference: SourceModel) -> TensorRef:
    """Return a model's counterpart of a tensor of the reference.

    Raises:
        UserError: the model lacks it.
    """
    if name not in model.info and name == OUTPUT and EMBEDDING in model.info:
        name = EMBEDDING  # the model ties the output matrix to its embedding
    if name not in model.info:
        raise missing_tensor(model, name, reference)
    return TensorRef(model=model, name=name)


def unused_tensors(base: SourceModel, models: Iterable[SourceModel]) -> list[str]:
    """Return a note for each model with tensors that the base lacks, which are left out."""
    notes = []
    for model in models:
        if extra := [name for name in model.tensor_names() if name not in base.info]:
            notes.append(left_out(model, extra, base))
    return notes


def left_out(model: SourceModel, names: Sequence[str], reference: SourceModel) -> str:
    """Return the note for tensors of a model that the reference lacks."""
    return f"{model.name}: {_count(names, 'tensor')} that {reference.name} lacks: left out"


def different_buffers(buffers: Iterable[Sequence[TensorRef]]) -> list[str]:
    """Return a note for each model whose integer or boolean tensors differ from the copied ones.

    Args:
        buffers: for each such tensor, its source, and its counterparts in other models.
    """
    different: dict[tuple[str, str], list[str]] = {}
    for copied, *others in buffers:
        values = copied.model.reader.read(copied.name)
        for ref in others:
            if not np.array_equal(values, ref.model.reader.read(ref.name)):
                different.setdefault((ref.model.name, copied.model.name), []).append(ref.name)
    return [
        f"{model}: {_count(names, 'integer or boolean tensor')} differ"
        f"{'s' * (len(names) == 1)} from {source}'s, which the result has"
        for (model, source), names in different.items()
    ]


def _count(names: Sequence[str], noun: str) -> str:
    if len(names) == 1:
        return f"the {noun} {names[0]}"
    return f"{len(names)} {noun}s (such as {names[0]})"


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
