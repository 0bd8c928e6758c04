"""The plan of a merge: one step per tensor of the result.

A step knows its source tensors, its algorithm with the hyperparameters that apply to this tensor,
and the program to compile.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from sdjax.core.errors import UserError
from sdjax.io.safetensors_writer import DTYPES
from sdjax.io.tensor_reader import TensorInfo, narrowed
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.recipe.expert_statistics import ExpertStatistics, StepStatistics
from sdjax.merging.recipe.source_models import (
    EMBEDDING,
    OUTPUT,
    SourceModel,
)
from sdjax.merging.recipe.tokenizer_plan import RowAlignment, TokenizerPlan
from sdjax.merging.tensor_program import TensorProgram, check_layers
from sdjax.models.tensor_names import layer_depths, parse_name
from sdjax.sharding.mesh import make_mesh

Members = tuple[tuple[str, ...], ...]
"""Names of tensors that are merged as one, by expert and part."""


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """A tensor of a source model.

    Attributes:
        model: the model.
        name: name of the tensor.
        members: for tensors that are merged as one, their names, by expert and part; `name` is then
            the name that they share.
    """

    model: SourceModel
    name: str
    members: Members = ()


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
        alignment: for vocabulary tensors, how their rows are aligned, if they have to be.
        members: for tensors that are merged as one, their names in the result, by expert and part.
        array: the values, if they have been merged in memory already.
        statistics: the experts' statistics that the program takes.
    """

    name: str
    path: str
    spec: jax.ShapeDtypeStruct
    sources: tuple[TensorRef, ...]
    has_base: bool = False
    algorithm: Algorithm | None = None
    program: TensorProgram | None = None
    alignment: RowAlignment | None = None
    members: Members = ()
    array: np.ndarray | None = None
    statistics: StepStatistics = field(default_factory=dict)


Stack = tuple[tuple[SourceModel, int], ...]
"""Templates of the layers of a stack: a source model and a layer number each."""


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """Plan of a merge from disk to disk.

    Attributes:
        steps: one step per tensor, in the order of the result's files.
        template: source of the result's config and, by default, of its tokenizer.
        stacks: for each stack of layers of the result, the templates of its layers: a source model
            and a layer number, from which a layer takes tensor names and config entries.
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
    stacks: tuple[Stack, ...]
    last: SourceModel
    models: tuple[SourceModel, ...]
    tokenizer: TokenizerPlan
    key: jax.Array | None
    slots: tuple[str, ...] | None = None
    scope: str | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def tensors(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Name, shape and dtype of all tensors of the result, in the order of its files."""
        specs: dict[str, jax.ShapeDtypeStruct] = {}
        for step in self.steps:
            if step.members:
                specs |= member_specs(step.members, step.spec)
            else:
                specs[step.name] = step.spec
        return specs

    @property
    def num_merged(self) -> int:
        """Number of tensors that are merged rather than copied."""
        merged = (s for s in self.steps if s.algorithm is not None or s.array is not None)
        return sum(sum(map(len, step.members)) or 1 for step in merged)

    @property
    def coverage(self) -> str:
        """How many tensors are merged, and how many are copied."""
        merged, total = self.num_merged, len(self.tensors)
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
    statistics: ExpertStatistics | None = None,
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
        statistics: statistics of the experts, if the algorithm requests any.
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
        own_statistics: StepStatistics = {}
        own = algorithm.at(place.spellings[-1], depths[place.path]) if merged else None
        if merged:
            for expert in experts.values():
                sources.append(required_tensor(expert, name, base))
                if expert.info[sources[-1].name].shape != info.shape:
                    error = shape_error(sources[-1], sources[0])
                    if name in base.vocabulary_tensors:
                        raise UserError(
                            f"{error}: the vocabularies differ; narrow --scope, such as to mlp, or "
                            "merge by a recipe, which matches rows by token"
                        )
                    raise error
        elif not is_floating(info):
            refs = (tensor_in(expert, name) for expert in experts.values())
            buffers.append([*sources, *(ref for ref in refs if ref is not None)])
        if own is not None and own.form == "tensor":
            if statistics is not None:
                paths_of = (parse_name(ref.name).path for ref in sources[1:])
                own_statistics = statistics.of_tensor(dict(enumerate(paths_of)), info.shape)
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
                statistics=statistic_specs(own_statistics),
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
                statistics=own_statistics,
            )
        )
    return MergePlan(
        steps=tuple(steps),
        template=base,
        stacks=(tuple((base, layer) for layer in range(len(base.layers))),),
        last=base,
        models=(base, *experts.values()),
        tokenizer=TokenizerPlan(folder=base.folder, new_tokens={}, vocabulary=None),
        key=key if "key" in algorithm.requests else None,
        slots=slots,
        scope=scope,
        notes=(
            *notes,
            *(() if statistics is None else statistics.notes),
            *(note for model in (base, *experts.values()) for note in model.notes),
            *unused_tensors(base, experts.values()),
            *different_buffers(buffers),
        ),
    )


def fused_shape(members: Members, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of a fused tensor: experts, rows of all parts, columns."""
    return (len(members), len(members[0]) * shape[0], *shape[1:])


def member_specs(members: Members, spec: jax.ShapeDtypeStruct) -> dict[str, jax.ShapeDtypeStruct]:
    """Return shape and dtype of the members of a fused tensor."""
    rows, columns = spec.shape[1] // len(members[0]), spec.shape[2]
    member = jax.ShapeDtypeStruct((rows, columns), spec.dtype)
    return {name: member for names in members for name in names}


def is_floating(info: TensorInfo) -> bool:
    """Return whether a tensor holds weights, and not a buffer such as position ids or a mask."""
    return info.dtype in DTYPES.values()


def is_mergeable(info: TensorInfo) -> bool:
    """Return whether there is anything to compute for a tensor."""
    return is_floating(info) and math.prod(info.shape) > 0


def tensor_in(model: SourceModel, name: str) -> TensorRef | None:
    """Return a model's tensor of this name, in the model's own spelling; None if it has none."""
    found = model.counterpart(name)
    if found is None and name == OUTPUT and EMBEDDING in model.info:
        found = EMBEDDING  # the model ties the output matrix to its embedding
    return None if found is None else TensorRef(model=model, name=found)


def required_tensor(model: SourceModel, name: str, reference: SourceModel) -> TensorRef:
    """Return a model's counterpart of a tensor of the reference.

    Raises:
        UserError: the model lacks it.
    """
    ref = tensor_in(model, name)
    if ref is None:
        raise UserError(f"{model.folder} lacks tensor {name}, which is in {reference.folder}")
    return ref


def unused_tensors(base: SourceModel, models: Iterable[SourceModel]) -> list[str]:
    """Return a note for each model with tensors that the base lacks, which are left out."""
    notes = []
    for model in models:
        extra = [name for name in model.tensor_names() if base.counterpart(name) is None]
        if extra:
            notes.append(left_out(model, extra, base))
    return notes


def left_out(model: SourceModel, names: Sequence[str], reference: SourceModel) -> str:
    """Return the note for tensors of a model that the reference lacks."""
    return f"{model.name}: {count_names(names, 'tensor')} that {reference.name} lacks: left out"


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
        f"{model}: {count_names(names, 'integer or boolean tensor')} differ"
        f"{'s' * (len(names) == 1)} from {source}'s, which the result has"
        for (model, source), names in different.items()
    ]


def count_names(names: Sequence[str], noun: str) -> str:
    """Return how many tensors there are, with the name of one of them."""
    if len(names) == 1:
        return f"the {noun} {names[0]}"
    return f"{len(names)} {noun}s (such as {names[0]})"


def shape_error(ref: TensorRef, reference: TensorRef) -> UserError:
    """Return the error for a tensor whose shape differs from the reference's."""
    shape, expected = (r.model.info[r.name].shape for r in (ref, reference))
    return UserError(
        f"tensor {ref.name} has shape {list(shape)} in {ref.model.folder}, "
        f"{list(expected)} in {reference.model.folder}"
    )


def statistic_specs(
    statistics: StepStatistics,
) -> dict[str, tuple[jax.ShapeDtypeStruct, ...] | None]:
    """Return the shapes, dtypes and shardings of a tensor's statistics, to compile for."""
    return {
        kind: None
        if refs is None
        else tuple(
            jax.ShapeDtypeStruct(ref.shape, ref.spec.dtype, sharding=tensor_sharding(ref.shape))
            for ref in refs
        )
        for kind, refs in statistics.items()
    }


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
