"""Plan of one slice of a recipe: its models opened and compared, and a step per tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.tensor_reader import common_dtype, narrowed
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import default_slots
from sdjax.merging.method import Method
from sdjax.merging.recipe.expert_statistics import (
    ExpertStatistics,
    StepStatistics,
    find_statistics,
    needs_statistics,
)
from sdjax.merging.recipe.fused_experts import fuse_experts
from sdjax.merging.recipe.method_sources import check_parameters, split_base
from sdjax.merging.recipe.parameters import FUSE_EXPERTS, ParameterType, resolve
from sdjax.merging.recipe.plan import (
    Members,
    MergeStep,
    TensorRef,
    count_names,
    fused_shape,
    is_floating,
    is_mergeable,
    left_out,
    shape_error,
    statistic_specs,
    tensor_in,
    tensor_sharding,
)
from sdjax.merging.recipe.schema import Recipe, Slice, Source
from sdjax.merging.recipe.source_models import OUTPUT, SourceModel
from sdjax.merging.recipe.tokenizer_plan import RowAlignment, VocabularyMap
from sdjax.merging.tensor_program import TensorProgram
from sdjax.models.tensor_names import parse_name

Tensor = tuple[str, Members, list[TensorRef | None]]
"""A tensor of the result: its name, its members if it is fused, and its source in every model."""


class SlicePlanner:
    """One slice of a recipe, with its models opened and compared.

    Attributes:
        models: the models, the base that is subtracted first.
        reference: the model whose tensors the result has: the base, or else the first model.
        start: first layer of the reference.
        num_layers: number of layers of the slice.
        buffers: for each integer or boolean tensor, its sources.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        part: Slice,
        open_model: Callable[[str], SourceModel],
        key: jax.Array | None,
    ):
        """Open the models and compare their numbers of layers.

        Args:
            recipe: the recipe.
            method: its method.
            part: the slice.
            open_model: opens a model, or the part of it that is merged, by name.
            key: PRNG key, if the method is random.

        Raises:
            UserError: unknown parameters, or models that do not match.
        """
        self._recipe, self._method, self._slice, self._key = recipe, method, part, key
        self._base_name = part.base_model or recipe.base_model
        base, self._experts = split_base(recipe, method, part)
        self._has_base = base is not None
        sources = ([base] if base else []) + self._experts
        self._notes = check_parameters(recipe, method, part, sources)
        self.models = [self._open(source, open_model) for source in sources]
        names = [model.name for model in self.models]
        self._reference = names.index(self._base_name) if self._base_name in names else 0
        self.reference = self.models[self._reference]
        ranges = [self._layer_range(s, m) for s, m in zip(sources, self.models, strict=True)]
        self._starts = [start for start, _ in ranges]
        self.start = self._starts[self._reference]
        lengths = [end - start for start, end in ranges]
        self.num_layers = lengths[0]
        if len(set(lengths)) > 1:
            each = [f"{m.name} has {n}" for m, n in zip(self.models, lengths, strict=True)]
            message = f"all sources must have the same number of layers: {', '.join(each)}"
            raise recipe.fail(part.line, message)
        self._statistics = self._open_statistics()
        self._bound: dict[tuple, Algorithm] = {}
        self._vocabulary = frozenset[str]().union(*(m.vocabulary_tensors for m in self.models))
        # Tensors that a model has and the reference lacks, or the other way round.
        self._extra: dict[SourceModel, dict[str, None]] = {}
        self._missing: dict[SourceModel, dict[str, None]] = {}
        self.buffers: list[list[TensorRef]] = []

    @property
    def notes(self) -> list[str]:
        """Remarks for the user on the tensors that were planned."""
        notes = [*self._notes]
        notes += [left_out(m, list(names), self.reference) for m, names in self._extra.items()]
        notes += [
            f"{model.name}: lacks {count_names(list(names), 'tensor')} that {self.reference.name} "
            "has: merged without it"
            for model, names in self._missing.items()
        ]
        return notes

    def outside_tensors(self) -> Iterator[Tensor]:
        """Yield each tensor outside the layers."""
        names = list(self.reference.outside)
        for model in self.models:
            extra = [name for name in model.outside if self.reference.counterpart(name) is None]
            if OUTPUT in extra:  # the reference ties it to the embedding
                extra.remove(OUTPUT)
                names.append(OUTPUT)
            if extra:
                self._extra.setdefault(model, {}).update(dict.fromkeys(extra))
        for name in dict.fromkeys(names):
            yield name, (), [tensor_in(model, name) for model in self.models]

    def layer_tensors(self, index: int, number: int) -> Iterator[Tensor]:
        """Yield each tensor of a layer.

        Args:
            index: number of the layer within the slice.
            number: its number in the result.

        Raises:
            UserError: a model lacks a tensor that others of its layers have, or the other way
                round.
        """
        suffixes = self.reference.layers[self.start + index]
        for model, start in zip(self.models, self._starts, strict=True):
            own = model.layers[start + index]
            self._check_layer(model, start + index, set(suffixes).difference(own), self.reference)
            extra = set(own).difference(suffixes)
            self._check_layer(self.reference, self.start + index, extra, model)
            if extra:
                full = (f"{model.prefix}{start + index}{suffix}" for suffix in sorted(extra))
                self._extra.setdefault(model, {}).update(dict.fromkeys(full))
        tensors = []
        for suffix in suffixes:
            names = [
                f"{model.prefix}{start + index}{suffix}"
                for model, start in zip(self.models, self._starts, strict=True)
            ]
            sources = [
                TensorRef(model=model, name=name) if name in model.info else None
                for model, name in zip(self.models, names, strict=True)
            ]
            tensors.append((f"{self.reference.prefix}{number}{suffix}", sources))
        if self._fuse_experts:
            yield from fuse_experts(tensors)
        else:
            for name, sources in tensors:
                yield name, (), sources

    def _check_layer(
        self, model: SourceModel, layer: int, missing: set[str], other: SourceModel
    ) -> None:
        """Raise UserError if a layer lacks tensors that other layers of the same model have."""
        known = {suffix for suffixes in model.layers for suffix in suffixes}
        if damaged := sorted(missing & known):
            raise UserError(
                f"{model.folder} lacks tensor {model.prefix}{layer}{damaged[0]}, which is in "
                f"{other.folder}"
            )

    def step(
        self,
        tensor: Tensor,
        position: float,
        depth: float,
        vocabulary: VocabularyMap | None,
    ) -> MergeStep:
        """Return the step of one tensor.

        Args:
            tensor: the tensor.
            position: position of its layer within the slice; below 0 outside the layers.
            depth: depth of its layer in the result; -1 outside the layers.
            vocabulary: how rows are aligned, if the vocabularies differ.
        """
        name, members, sources = tensor
        refs = [ref for ref in sources if ref is not None]
        infos = [ref.model.info[ref.members[0][0] if members else ref.name] for ref in refs]
        place, own = parse_name(name), sources[self._reference] or refs[0]
        if not all(map(is_floating, infos)):
            self.buffers.append([own, *(ref for ref in refs if ref is not own)])
            info = own.model.info[own.name]
            spec = jax.ShapeDtypeStruct(info.shape, info.dtype)
            return MergeStep(name=name, path=place.path, spec=spec, sources=(own,))
        fixed = slice(name in self._vocabulary, None)  # vocabularies may have different sizes
        for ref, info in zip(refs, infos, strict=True):
            if len(info.shape) != len(infos[0].shape) or info.shape[fixed] != infos[0].shape[fixed]:
                raise shape_error(ref, refs[0])
        for model, source in zip(self.models, sources, strict=True):
            if source is None:
                self._missing.setdefault(model, {})[name] = None
        inputs = [
            (expert, ref)
            for expert, ref in zip(self._experts, sources[self._has_base :], strict=True)
            if ref is not None
        ]
        if len(refs) < len(sources) and len(inputs) < self._method.schema.min_models:
            inputs, refs = [], [own]  # too few are left for the method
        shape = fused_shape(members, infos[0].shape) if members else infos[0].shape
        alignment = None
        if vocabulary is not None and name in self._vocabulary:
            shape = (vocabulary.size, *shape[1:])
            alignment = self._alignment(vocabulary, refs)
        out_dtype = self._recipe.out_dtype or self._recipe.dtype
        dtype = jnp.dtype(out_dtype) if out_dtype else common_dtype(i.dtype for i in infos)
        spec = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        algorithm = program = None
        statistics: StepStatistics = {}
        if is_mergeable(infos[0]) and inputs:
            algorithm = self._bind(name, inputs, max(position, 0.0))
            dtypes = [info.dtype for info in infos]
            if alignment is not None:  # aligned in the common dtype
                dtypes = [common_dtype(dtypes)] * len(dtypes)
            specs = [
                jax.ShapeDtypeStruct(shape, narrowed(d), sharding=tensor_sharding(shape))
                for d in dtypes
            ]
            base, experts = (specs[0], specs[1:]) if self._has_base else (None, specs)
            if self._statistics is not None:
                paths = {
                    number: parse_name(ref.name).path
                    for number, ref in enumerate(sources[self._has_base :])
                    if ref is not None
                }
                realigned = alignment is not None
                statistics = self._statistics.of_tensor(paths, shape, realigned=realigned)
            program = TensorProgram.of(
                algorithm,
                default_slots(len(experts)),
                base,
                tuple(experts),
                path=place.path,
                depth=depth,
                key=self._key,
                dtype=narrowed(spec.dtype),
                statistics=statistic_specs(statistics),
            )
        return MergeStep(
            name=name,
            path=place.path,
            spec=spec,
            sources=tuple(refs),
            has_base=self._has_base and bool(inputs),
            algorithm=algorithm,
            program=program,
            alignment=alignment,
            members=members,
            statistics=statistics,
        )

    def _alignment(self, vocabulary: VocabularyMap, refs: Sequence[TensorRef]) -> RowAlignment:
        try:
            return vocabulary.alignment([ref.model.name for ref in refs], self._base_name)
        except ValueError as error:
            choice = self._recipe.tokenizer
            line = self._slice.line if choice is None else choice.line
            message = f"the source of a token, {error}, is not among the models of a slice"
            raise self._recipe.fail(line, message) from None

    @property
    def _fuse_experts(self) -> bool:
        parameter = ParameterType(key=FUSE_EXPERTS, name="bool", choices={})
        return bool(resolve(self._slice.levels, parameter, "", 0.0))

    def _bind(
        self, name: str, inputs: Sequence[tuple[Source, TensorRef]], position: float
    ) -> Algorithm:
        """Return the method with the hyperparameters of one tensor."""
        schema, levels = self._method.schema, self._slice.levels
        values: dict[str, Any] = {}
        for parameter in self._method.hyperparameters:
            per_expert = parameter.type == "per_expert"
            type_name = "float" if per_expert else parameter.type
            choices: Mapping[Any, str] = schema.choices.get(parameter.name, {})
            parameter_type = ParameterType(
                key=schema.recipe_key(parameter.name),
                name="unit_interval" if parameter.name in schema.unit_interval else type_name,
                choices=choices,
            )
            if per_expert:
                found = [
                    resolve((source.parameters, *levels), parameter_type, ref.name, position)
                    for source, ref in inputs
                ]
            else:
                found = [resolve(levels, parameter_type, name, position)]
            if None in found and parameter.name in schema.required:
                source = inputs[found.index(None)][0]
                suffix = f" for {source.model}" if per_expert else ""
                raise self._recipe.fail(
                    source.line if per_expert else "merge_method",
                    f"{self._method.name} needs the parameter {parameter_type.key!r}{suffix}",
                )
            default = schema.defaults.get(parameter.name, parameter.default)
            defaults = default if isinstance(default, tuple) else (default,) * len(found)
            found = [
                d if value is None else value for value, d in zip(found, defaults, strict=True)
            ]
            values[parameter.name] = tuple(found) if per_expert else found[0]
        traced = {p.name for p in self._method.hyperparameters if p.type in ("float", "per_expert")}
        static = {key: value for key, value in values.items() if key not in traced}
        cache_key = tuple(sorted(static.items()))
        if cache_key not in self._bound:
            self._bound[cache_key] = self._method.bind(**static)
        try:
            bound = self._bound[cache_key].bind(**{key: values[key] for key in traced})
            if not self._has_base:
                bound.constraints.check_without_base(bound.name, bound.hyperparameters)
            return bound
        except UserError as error:  # such as weights that sum to zero
            raise self._recipe.fail(self._slice.line, f"{error} (at {name})") from None

    def _open_statistics(self) -> ExpertStatistics | None:
        """Return the statistics of the models, if the method needs them."""
        algorithm = self._method.algorithm
        if not needs_statistics(algorithm):
            self._notes += [
                f"{self._recipe.path}, line {source.line}: stats has no meaning for "
                f"{self._method.name}; ignored"
                for source in self._slice.sources
                if source.stats is not None
            ]
            return None
        folders = []
        for source in self._experts:
            try:
                folder = find_statistics(source.model, source.stats, self._recipe.path.parent)
            except UserError as error:
                raise self._recipe.fail(source.line, f"{self._method.name}: {error}") from None
            folders.append(folder)
        names = [source.model for source in self._experts]
        statistics = ExpertStatistics(algorithm, folders, names)
        self._notes += statistics.notes
        return statistics

    def _open(self, source: Source, open_model: Callable[[str], SourceModel]) -> SourceModel:
        try:
            return open_model(source.model)
        except UserError as error:
            raise self._recipe.fail(source.line, str(error)) from None

    def _layer_range(self, source: Source, model: SourceModel) -> tuple[int, int]:
        num_layers = len(model.layers)
        if source.layers and not num_layers:
            raise self._recipe.fail(
                source.line,
                f"{source.model} is not a single stack of layers, which slices need; use models, "
                "or name the stack in modules",
            )
        start, end = source.layers or (0, num_layers)
        if end > num_layers:
            raise self._recipe.fail(
                source.line, f"{source.model} has {num_layers} layers, not {end}"
            )
        if source.ignored_layers not in (None, (0, num_layers)):
            raise self._recipe.fail(
                source.line,
                "layer_range has no effect in models; use slices to take only some layers of "
                f"{source.model}",
            )
        return start, end
