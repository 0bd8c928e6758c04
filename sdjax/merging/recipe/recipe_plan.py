"""Merge plans for recipes, with mergekit's semantics.

`RecipeSchema` describes how a method uses `base_model` and its parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.tensor_reader import common_dtype, narrowed
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import default_slots
from sdjax.merging.method import Method
from sdjax.merging.recipe.compatibility import compare_in_recipe
from sdjax.merging.recipe.method_sources import check_parameters, split_base
from sdjax.merging.recipe.parameters import ParameterType, resolve
from sdjax.merging.recipe.plan import (
    MergePlan,
    MergeStep,
    TensorRef,
    different_buffers,
    is_floating,
    is_mergeable,
    left_out,
    missing_tensor,
    shape_error,
    tensor_in,
    tensor_sharding,
)
from sdjax.merging.recipe.schema import Recipe, Slice, Source
from sdjax.merging.recipe.source_models import (
    OUTPUT,
    SourceModel,
)
from sdjax.merging.recipe.tensor_roles import precedes_layers
from sdjax.merging.recipe.tokenizer_plan import VocabularyMap, plan_tokenizer
from sdjax.merging.tensor_program import TensorProgram
from sdjax.models.tensor_names import parse_name


def plan_recipe(
    recipe: Recipe,
    method: Method,
    open_model: Callable[[str], SourceModel],
    seed: int = 0,
    *,
    allow_crimes: bool = False,
) -> MergePlan:
    """Plan the merge of a recipe.

    Args:
        recipe: the recipe.
        method: its method, from `find_method`.
        open_model: opens a model by name.
        seed: seed of random methods.
        allow_crimes: accept models of different architectures.

    Raises:
        UserError: unknown or missing parameters, or models that do not match.
    """
    # Only if needed, since creating a key compiles an executable.
    key = jax.random.key(seed) if "key" in method.bind().requests else None
    parts = [_SlicePlanner(recipe, method, part, open_model, key) for part in recipe.slices]
    num_layers = sum(part.num_layers for part in parts)
    if not num_layers and not recipe.whole_models:
        raise recipe.fail(recipe.slices[0].line, "the result would have no layers")
    models = tuple(open_model(name) for name in recipe.models())
    notes = compare_in_recipe(recipe, models, allow_crimes=allow_crimes)
    tokenizer = plan_tokenizer(models[0], models, recipe, open_model)
    steps: list[MergeStep] = []
    layers: list[tuple[SourceModel, int]] = []
    for name, sources in parts[0].outside_tensors():
        if precedes_layers(name):
            depth = parts[0].models[0].depth(name)
            steps.append(parts[0].step(name, sources, depth, depth, tokenizer.vocabulary))
    for part in parts:
        for index in range(part.num_layers):
            position = index / (part.num_layers - 1) if part.num_layers > 1 else 1.0
            depth = len(layers) / max(num_layers - 1, 1)
            for suffix, sources in part.layer_tensors(index):
                name = f"{part.models[0].prefix}{len(layers)}{suffix}"
                steps.append(part.step(name, sources, position, depth, None))
            layers.append((part.models[0], part.starts[0] + index))
    for name, sources in parts[-1].outside_tensors():
        if not precedes_layers(name):
            depth = parts[-1].models[0].depth(name)
            steps.append(parts[-1].step(name, sources, depth, depth, tokenizer.vocabulary))
    return MergePlan(
        steps=tuple(steps),
        template=models[0],
        layers=tuple(layers),
        last=parts[-1].models[0],
        models=models,
        tokenizer=tokenizer,
        key=key,
        notes=(
            *notes,
            *(note for model in models for note in model.notes),
            *recipe.notes,
            *dict.fromkeys(note for part in parts for note in part.notes),
            *tokenizer.notes,
            *different_buffers(buffers for part in parts for buffers in part.buffers),
        ),
    )


class _SlicePlanner:
    """One slice of a recipe, with its models opened and compared.

    Attributes:
        models: the models, the base that is subtracted first.
        starts: first layer of each model.
        num_layers: number of layers of the slice.
        buffers: for each integer or boolean tensor, its sources.
        notes: remarks for the user.
    """

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        part: Slice,
        open_model: Callable[[str], SourceModel],
        key: jax.Array | None,
    ):
        self._recipe, self._method, self._slice, self._key = recipe, method, part, key
        self.notes: list[str] = []
        self._base_name = part.base_model or recipe.base_model
        base, self._experts = split_base(recipe, method, part)
        self._has_base = base is not None
        sources = ([base] if base else []) + self._experts
        self.notes += check_parameters(recipe, method, part, sources)
        self.models = [self._open(source, open_model) for source in sources]
        ranges = [self._layer_range(s, m) for s, m in zip(sources, self.models, strict=True)]
        self.starts = [start for start, _ in ranges]
        lengths = [end - start for start, end in ranges]
        self.num_layers = lengths[0]
        if len(set(lengths)) > 1:
            each = [f"{m.name} has {n}" for m, n in zip(self.models, lengths, strict=True)]
            message = f"all sources must have the same number of layers: {', '.join(each)}"
            raise recipe.fail(part.line, message)
        self._bound: dict[tuple, Algorithm] = {}
        self._vocabulary = frozenset[str]().union(*(m.vocabulary_tensors for m in self.models))
        self.buffers: list[list[TensorRef]] = []

    def outside_tensors(self) -> Iterator[tuple[str, list[TensorRef]]]:
        """Yield each tensor outside the layers: its name, and its source in every model."""
        reference, *others = self.models
        names = list(reference.outside)
        for model in others:
            extra = [name for name in model.outside if name not in reference.outside]
            if OUTPUT in extra:  # the reference ties it to the embedding
                extra.remove(OUTPUT)
                names.append(OUTPUT)
            if extra:
                self.notes.append(left_out(model, extra, reference))
        for name in dict.fromkeys(names):
            info = reference.info.get(name)
            buffer = info is not None and not is_floating(info)
            models = [m for m in self.models if name in m.info] if buffer else self.models
            yield name, [tensor_in(model, name, reference) for model in models]

    def layer_tensors(self, index: int) -> Iterator[tuple[str, list[TensorRef]]]:
        """Yield each tensor of a layer: the suffix of its name, and its source in every model."""
        reference, start = self.models[0], self.starts[0] + index
        suffixes = reference.layers[start]
        for model, first in zip(self.models[1:], self.starts[1:], strict=True):
            # Both under the reference's layer number, for the error message.
            extra = set(model.layers[first + index]) - set(suffixes)
            if extra:
                raise UserError(
                    f"{model.folder} has tensor {model.prefix}{start}{min(extra)}, which is not in "
                    f"{reference.folder}"
                )
        for suffix in suffixes:
            names = [
                (model, f"{model.prefix}{first + index}{suffix}")
                for model, first in zip(self.models, self.starts, strict=True)
            ]
            sources = [TensorRef(model=m, name=name) for m, name in names if name in m.info]
            # Buffers are copied from the reference, so the others may lack them.
            if len(sources) < len(names) and is_floating(reference.info[names[0][1]]):
                model, name = next((m, name) for m, name in names if name not in m.info)
                raise missing_tensor(model, name, reference)
            yield suffix, sources

    def step(
        self,
        name: str,
        sources: list[TensorRef],
        position: float,
        depth: float,
        vocabulary: VocabularyMap | None,
    ) -> MergeStep:
        """Return the step of one tensor.

        Args:
            name: its name in the result.
            sources: the tensor in each model.
            position: position of its layer within the slice; below 0 outside the layers.
            depth: depth of its layer in the result; -1 outside the layers.
            vocabulary: how rows are aligned, if the vocabularies differ.
        """
        infos = [ref.model.info[ref.name] for ref in sources]
        place = parse_name(name)
        if not all(map(is_floating, infos)):
            self.buffers.append(sources)
            spec = jax.ShapeDtypeStruct(infos[0].shape, infos[0].dtype)
            return MergeStep(name=name, path=place.path, spec=spec, sources=(sources[0],))
        fixed = slice(name in self._vocabulary, None)  # vocabularies may have different sizes
        for ref, info in zip(sources, infos, strict=True):
            if len(info.shape) != len(infos[0].shape) or info.shape[fixed] != infos[0].shape[fixed]:
                raise shape_error(ref, sources[0])
        out_dtype = self._recipe.out_dtype or self._recipe.dtype
        dtype = jnp.dtype(out_dtype) if out_dtype else common_dtype(i.dtype for i in infos)
        shape, row_maps = infos[0].shape, None
        if vocabulary is not None and name in self._vocabulary:
            shape = (vocabulary.size, *shape[1:])
            row_maps = tuple(vocabulary.rows[model.name] for model in self.models)
        fallbacks = [i for i, model in enumerate(self.models) if model.name == self._base_name]
        spec = jax.ShapeDtypeStruct(shape, np.dtype(dtype))
        algorithm = program = None
        if is_mergeable(infos[0]) and self._experts:
            algorithm = self._bind(name, sources, max(position, 0.0))
            dtypes = [info.dtype for info in infos]
            if row_maps is not None:  # aligned in the common dtype
                dtypes = [common_dtype(dtypes)] * len(dtypes)
            specs = [
                jax.ShapeDtypeStruct(shape, narrowed(d), sharding=tensor_sharding(shape))
                for d in dtypes
            ]
            base, experts = (specs[0], specs[1:]) if self._has_base else (None, specs)
            program = TensorProgram.of(
                algorithm,
                default_slots(len(experts)),
                base,
                tuple(experts),
                path=place.path,
                depth=depth,
                key=self._key,
                dtype=narrowed(spec.dtype),
            )
        return MergeStep(
            name=name,
            path=place.path,
            spec=spec,
            sources=tuple(sources),
            has_base=self._has_base,
            algorithm=algorithm,
            program=program,
            row_maps=row_maps,
            fallback=fallbacks[0] if fallbacks else None,
        )

    def _bind(self, name: str, sources: Sequence[TensorRef], position: float) -> Algorithm:
        """Return the method with the hyperparameters of one tensor."""
        inputs = sources[self._has_base :]
        schema, levels = self._method.schema, self._slice.levels
        values: dict[str, Any] = {}
        for parameter in self._method.hyperparameters:
            per_expert = parameter.type == "per_expert"
            type_name = "float" if per_expert else parameter.type
            parameter_type = ParameterType(
                key=schema.recipe_key(parameter.name),
                name="unit_interval" if parameter.name in schema.unit_interval else type_name,
                choices=schema.choices.get(parameter.name, {}),
            )
            if per_expert:
                found = [
                    resolve((source.parameters, *levels), parameter_type, ref.name, position)
                    for source, ref in zip(self._experts, inputs, strict=True)
                ]
            else:
                found = [resolve(levels, parameter_type, name, position)]
            if None in found and parameter.name in schema.required:
                source = self._experts[found.index(None)]
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
                f"{source.model} is not a single stack of layers, which slices need; use models",
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
