"""What a recipe comes to for given models: one step for each tensor of the result.

A step knows its inputs and its algorithm, with the values that hold for this tensor. The meaning
follows mergekit: see ``RecipeSchema`` (``method.py``) for how a method reads ``base_model`` and its
parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError, truncated_repr
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.method import Hyperparameter, Method
from sdjax.merging.recipe.parameters import ParameterMap, find
from sdjax.merging.recipe.schema import Recipe, Slice, Source
from sdjax.merging.recipe.source_models import (
    EMBEDDING,
    OUTPUT,
    VOCABULARY_TENSORS,
    SourceModel,
    tensor_path,
)

_ALWAYS_IGNORED = ("int8_mask",)  # mergekit's way to save memory; no mask is stored here


@dataclass(frozen=True, kw_only=True)
class TensorRef:
    """A tensor of one model."""

    model: SourceModel
    name: str


@dataclass(frozen=True, kw_only=True)
class MergeStep:
    """One tensor of the result.

    path: ours, which random keys and ``depth`` follow. dtype: in which it is written. base: what
    task vectors are relative to, or None. algorithm: None where the first of ``everything`` is
    taken as it is, as a tensor without elements always is.
    vocabulary: whether the first axis is the vocabulary, so that rows are to be matched by token.
    anchor: the place of the recipe's base among (base, *inputs), for the rows that some model
    lacks.
    """

    name: str
    path: str
    dtype: np.dtype
    base: TensorRef | None
    inputs: tuple[TensorRef, ...]
    algorithm: Algorithm | None
    vocabulary: bool = False
    anchor: int | None = None

    @property
    def everything(self) -> tuple[TensorRef, ...]:
        """The base, if there is one, and the inputs."""
        return ((self.base,) if self.base else ()) + self.inputs

    @property
    def shape(self) -> tuple[int, ...]:
        first = self.everything[0]
        return first.model.tensors.shape(first.name)


@dataclass(frozen=True, kw_only=True)
class MergePlan:
    """All steps in the order of the result's files; the model whose config and tokenizer it gets.

    layers: for each layer of the result, the model and its layer that name the tensors, whose
    config says of which kind it is. slots: the experts' names in the algorithms' dicts, or None for
    expert_1 ... expert_k.
    """

    steps: tuple[MergeStep, ...]
    template: SourceModel
    layers: tuple[tuple[SourceModel, int], ...]
    slots: tuple[str, ...] | None = None
    models: tuple[SourceModel, ...] = field(default=())

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def draws(self) -> bool:
        """Whether random numbers are drawn."""
        return any("key" in step.algorithm.requests for step in self.steps if step.algorithm)


def plan_recipe(
    recipe: Recipe, methods: Mapping[str, Method], open_model: Callable[[str], SourceModel]
) -> MergePlan:
    """Raises UserError for what the method does not take or lacks, and for models that do not fit
    together.
    """
    if recipe.merge_method not in methods:
        known = ", ".join(methods)
        message = f"no merge_method {truncated_repr(recipe.merge_method)}; there are: {known}"
        raise recipe.fail("merge_method", message)
    method = methods[recipe.merge_method]
    parts = [_Part(recipe, method, part, open_model) for part in recipe.slices]
    first, last = parts[0], parts[-1]
    names = list(first.outside(lambda name: name == EMBEDDING))
    steps = [first.step(name, {}, 0.0) for name in names]
    layers: list[tuple[SourceModel, int]] = []
    for part in parts:
        for index in range(part.num_layers):
            place = index / (part.num_layers - 1) if part.num_layers > 1 else 1.0
            steps += part.layer(index, len(layers), place)
            layers.append((part.models[0], part.starts[0] + index))
    steps += [last.step(name, {}, 0.0) for name in last.outside(lambda name: name != EMBEDDING)]
    named = recipe.models()
    return MergePlan(
        steps=tuple(steps),
        template=open_model(named[0]),
        layers=tuple(layers),
        models=tuple(open_model(name) for name in named),
    )


def plan_algorithm(
    algorithm: Algorithm,
    base: SourceModel,
    experts: Mapping[str, SourceModel],
    scope: Sequence[str],
) -> MergePlan:
    """An algorithm over the tensors of a base that are in scope; the others are the base's own.

    scope: our paths. Raises UserError where an expert does not fit the base.
    """
    wanted = set(scope)
    steps = []
    for name in _all_tensors(base):
        inputs = tuple(TensorRef(model=expert, name=name) for expert in experts.values())
        at = TensorRef(model=base, name=name)
        merged = tensor_path(name) in wanted and math.prod(base.tensors.shape(name)) > 0
        if merged:
            for one in inputs:
                if name not in one.model.tensors.names:
                    raise _lacks(one.model, name, base)
            _check_shapes((at, *inputs), vocabulary=False)
        steps.append(
            MergeStep(
                name=name,
                path=tensor_path(name),
                dtype=base.tensors.dtype(name),
                base=at if merged else None,
                inputs=inputs if merged else (at,),
                algorithm=algorithm if merged else None,
            )
        )
    return MergePlan(
        steps=tuple(steps),
        template=base,
        layers=tuple((base, layer) for layer in range(len(base.layers))),
        slots=tuple(experts),
        models=(base, *experts.values()),
    )


def _all_tensors(model: SourceModel) -> list[str]:
    layers = [model.tensor(index, end) for index, ends in enumerate(model.layers) for end in ends]
    return [*(n for n in model.outside if n == EMBEDDING), *layers] + [
        name for name in model.outside if name != EMBEDDING
    ]


class _Part:
    """One slice of a recipe, with its models opened and checked against each other."""

    def __init__(
        self,
        recipe: Recipe,
        method: Method,
        part: Slice,
        open_model: Callable[[str], SourceModel],
    ):
        self.recipe, self.method, self.part = recipe, method, part
        base, experts = self._divide()
        self.sources = ([base] if base else []) + experts
        self.has_base = base is not None
        self._refuse_unknown()
        self.models = [self._open(source, open_model) for source in self.sources]
        self._named_base = part.base_model or recipe.base_model
        ranges = [self._layers(s, m) for s, m in zip(self.sources, self.models, strict=True)]
        self.starts = [start for start, _ in ranges]
        lengths = [end - start for start, end in ranges]
        self.num_layers = lengths[0]
        if len(set(lengths)) > 1:
            told = ", ".join(f"{m.name} has {n}" for m, n in zip(self.models, lengths, strict=True))
            raise self.recipe.fail(part.line, f"all sources must have as many layers, but {told}")
        self._bound: dict[tuple, Algorithm] = {}

    def outside(self, wanted: Callable[[str], bool]) -> list[str]:
        """The names of the tensors outside the layers."""
        reference = self.models[0]
        for model in self.models[1:]:
            _check_names(reference, model, reference.outside, model.outside, OUTPUT)
        names = dict.fromkeys(name for model in self.models for name in model.outside)
        return [name for name in names if wanted(name)]

    def layer(self, index: int, out: int, place: float) -> list[MergeStep]:
        """The steps of one layer of the result."""
        reference, start = self.models[0], self.starts[0]
        ends = reference.layers[start + index]
        for model, first in zip(self.models[1:], self.starts[1:], strict=True):
            theirs = [model.tensor(start + index, end) for end in model.layers[first + index]]
            ours = [reference.tensor(start + index, end) for end in ends]
            _check_names(reference, model, ours, theirs)
        return [
            self.step(
                reference.tensor(out, end),
                {
                    i: model.tensor(first + index, end)
                    for i, (model, first) in enumerate(zip(self.models, self.starts, strict=True))
                },
                place,
            )
            for end in ends
        ]

    def step(self, name: str, names: Mapping[int, str], place: float) -> MergeStep:
        """``names``: the tensor of each model by place, ``name`` itself where it is absent."""
        found = []
        for index, model in enumerate(self.models):
            theirs = names.get(index, name)
            if theirs == OUTPUT and OUTPUT not in model.outside:
                theirs = EMBEDDING  # a model that ties the two
            found.append(TensorRef(model=model, name=theirs))
        vocabulary = name in VOCABULARY_TENSORS
        _check_shapes(found, vocabulary)
        base, inputs = (found[0], found[1:]) if self.has_base else (None, found)
        anchors = [i for i, m in enumerate(self.models) if m.name == self._named_base]
        wanted = self.recipe.out_dtype or self.recipe.dtype
        stored = jnp.result_type(*(one.model.tensors.dtype(one.name) for one in found))
        return MergeStep(
            name=name,
            path=tensor_path(name),
            dtype=np.dtype(jnp.dtype(wanted) if wanted else stored),
            base=base,
            inputs=tuple(inputs),
            algorithm=self._algorithm(name, [one.name for one in inputs], place)
            if math.prod(found[0].model.tensors.shape(found[0].name))
            else None,
            vocabulary=vocabulary,
            anchor=anchors[0] if anchors else None,
        )

    def _divide(self) -> tuple[Source | None, list[Source]]:
        """The source that is subtracted, if one is, and the others in the method's order."""
        schema, part = self.method.schema, self.part
        name = part.base_model or self.recipe.base_model
        sources = list(part.sources)
        seen: set[tuple] = set()
        for source in sources:
            if (source.model, source.layers) in seen:
                raise self.recipe.fail(source.line, f"{source.model} stands here a second time")
            seen.add((source.model, source.layers))
        if name is None and schema.base in ("required", "first"):
            raise self.recipe.fail("merge_method", f"{self.method.name} needs base_model")
        named = [source for source in sources if source.model == name]
        if name is not None and not named and self.recipe.whole:
            line = self.recipe.lines.get("base_model", part.line)
            named = [Source(model=name, layers=None, parameters={}, line=line)]
            sources += named
        if name is not None and not named and schema.base != "plain":
            raise self.recipe.fail(
                part.line, f"base_model {name} is not among the sources of this slice"
            )
        base = None
        if schema.base != "plain" and named:
            sources.remove(named[0])
            if schema.base == "first":
                sources.insert(0, named[0])
            else:
                base = named[0]
        most = schema.max_models
        if len(sources) < schema.min_models or (most is not None and len(sources) > most):
            few = schema.min_models
            bound = "exactly" if few == most else "at least" if len(sources) < few else "at most"
            count = few if len(sources) < few or most is None else most
            raise self.recipe.fail(
                part.line,
                f"{self.method.name} takes {bound} {count} model{'s' * (count > 1)}"
                f"{' beside base_model' if base else ''}, not {len(sources)}",
            )
        return base, sources

    def _open(self, source: Source, open_model: Callable[[str], SourceModel]) -> SourceModel:
        try:
            return open_model(source.model)
        except UserError as error:
            raise self.recipe.fail(source.line, str(error)) from None

    def _layers(self, source: Source, model: SourceModel) -> tuple[int, int]:
        have = len(model.layers)
        start, end = source.layers or (0, have)
        if end > have:
            raise self.recipe.fail(source.line, f"{source.model} has {have} layers, not {end}")
        return start, end

    def _refuse_unknown(self) -> None:
        schema = self.method.schema
        ignored = {*schema.ignored, *_ALWAYS_IGNORED}
        shared = {schema.recipe_key(p.name) for p in self.method.hyperparameters}
        each = {
            schema.recipe_key(p.name) for p in self.method.hyperparameters if p.type == "per_expert"
        }
        levels: list[tuple[ParameterMap, set[str], str]] = [
            (source.parameters, each, "for one model") for source in self.sources
        ]
        levels += [(level, shared, "for the whole merge") for level in self.part.levels]
        for level, allowed, where in levels:
            for key, setting in level.items():
                if key not in allowed | ignored:
                    raise self.recipe.fail(
                        setting.line,
                        f"{self.method.name} has no parameter {truncated_repr(key)} {where}; "
                        f"allowed: {', '.join(sorted(allowed)) or 'none'}",
                    )

    def _algorithm(self, name: str, inputs: Sequence[str], place: float) -> Algorithm:
        """The method with the values for one tensor."""
        experts = self.sources[1:] if self.has_base else self.sources
        values: dict[str, Any] = {}
        for parameter in self.method.hyperparameters:
            if parameter.type == "per_expert":
                values[parameter.name] = tuple(
                    self._value(
                        parameter, (source.parameters, *self.part.levels), theirs, place, source
                    )
                    for source, theirs in zip(experts, inputs, strict=True)
                )
            else:
                values[parameter.name] = self._value(parameter, self.part.levels, name, place)
        traced = {p.name for p in self.method.hyperparameters if p.type in ("float", "per_expert")}
        static = {key: value for key, value in values.items() if key not in traced}
        signature = tuple(sorted(static.items()))
        if signature not in self._bound:
            self._bound[signature] = self.method.bind(**static)
        return self._bound[signature].bind(**{key: values[key] for key in traced})

    def _value(
        self,
        parameter: Hyperparameter,
        levels: Sequence[ParameterMap],
        tensor: str,
        place: float,
        source: Source | None = None,
    ) -> Any:
        schema = self.method.schema
        key = schema.recipe_key(parameter.name)
        kind = "float" if parameter.type == "per_expert" else parameter.type
        if parameter.name in schema.unit_interval:
            kind = "share"
        found = find(levels, key, tensor, place, kind, schema.choices.get(parameter.name, {}))
        if found is not None:
            return found
        if parameter.name in schema.required:
            whose = f" for {source.model}" if source else ""
            at = source.line if source else "merge_method"
            raise self.recipe.fail(at, f"{self.method.name} needs the parameter {key!r}{whose}")
        return schema.defaults.get(parameter.name, parameter.default)


def _check_names(
    reference: SourceModel,
    model: SourceModel,
    ours: Sequence[str],
    theirs: Sequence[str],
    tied: str = "",
) -> None:
    if missing := sorted(set(ours) - set(theirs) - {tied}):
        raise _lacks(model, missing[0], reference)
    if surplus := sorted(set(theirs) - set(ours) - {tied}):
        raise UserError(
            f"{model.folder} has tensor {surplus[0]}, which is not in {reference.folder}"
        )


def _lacks(model: SourceModel, name: str, reference: SourceModel) -> UserError:
    return UserError(f"{model.folder} lacks tensor {name}, which is in {reference.folder}")


def _check_shapes(inputs: Sequence[TensorRef], vocabulary: bool) -> None:
    """Of one tensor in all models; ``vocabulary``: the first axis may differ."""
    skip = 1 if vocabulary else 0
    first = inputs[0]
    shape = first.model.tensors.shape(first.name)
    for one in inputs[1:]:
        other = one.model.tensors.shape(one.name)
        if other[skip:] != shape[skip:] or len(other) != len(shape):
            raise UserError(
                f"tensor {one.name} has shape {list(other)} in {one.model.folder}, "
                f"{list(shape)} in {first.model.folder}"
            )
