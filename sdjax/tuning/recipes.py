"""Recipes (mergekit's YAML) whose numbers are tuned.

A recipe of one method over whole models. Every number of its `parameters` is a parameter, be it a
single value, an item of a list along the layers, or the value of an entry with a filter; a number
that several models share is one parameter. Single zeros, which switch a model or a tensor off, and
tolerances stay. Tuned numbers are put back into the text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from sdjax.core.errors import UserError
from sdjax.core.yaml import YamlDocument
from sdjax.merging.engine import default_slots
from sdjax.merging.method import Hyperparameter, Method
from sdjax.merging.recipe.method_sources import check_parameters, split_base
from sdjax.merging.recipe.parameters import ParameterType, resolve
from sdjax.merging.recipe.recipe_method import find_method
from sdjax.merging.recipe.recipe_reader import read_recipe
from sdjax.merging.recipe.schema import Recipe, Source
from sdjax.tuning.families import SMALL, bounds_of
from sdjax.tuning.model_set import ModelSet, NamedMerge, short_names
from sdjax.tuning.patterns import Number, Pattern, PatternedAlgorithm, rounded
from sdjax.tuning.types import Parameter, Tunable

Entry = tuple[str | None, tuple[Number, ...]]

_PROPERTIES = re.compile(r"([&!]\S*\s+)*")  # anchor and tag of a node


def read_tunable_recipe(path: Path) -> NamedMerge:
    """Read a recipe whose numbers are tuned.

    Args:
        path: the recipe.

    Raises:
        UserError: an invalid recipe, one that takes models apart or changes the tokenizer, or one
            without numbers.
    """
    recipe = read_recipe(path)
    if recipe.merge_method.endswith(".py") or "/" in recipe.merge_method:
        message = f"the method is a program; tune {recipe.merge_method} itself"
        raise recipe.fail("merge_method", message)
    method, _ = find_method(recipe, _no_models)
    for key in ("slices", "modules"):
        if key in recipe.lines:
            raise recipe.fail(key, f"tuning takes whole models; write models instead of {key}")
    choice = recipe.tokenizer
    if choice is not None and (choice.source, choice.pad_to_multiple_of) != ("base", 1):
        message = "tuning keeps the base's tokenizer; remove the key until the final merge"
        raise recipe.fail(choice.line, message)
    (part,) = recipe.slices
    base, experts = split_base(recipe, method, part)
    sources = [*([base] if base else []), *experts]
    check_parameters(recipe, method, part, sources)
    reader = _Reader(recipe, method, experts)
    tunable = reader.tunable()
    if not tunable.parameters:
        raise UserError(
            f"{path}: no number to tune; give a parameter of {method.name} a number, such as a "
            "weight for each model"
        )
    return NamedMerge(
        base=base.model if base else None,
        experts=dict(zip(tunable.slots, (e.model for e in experts), strict=True)),
        folder=path.parent,
        open=lambda models: reader.checked(tunable, models),
    )


def _no_models(name: str) -> Any:
    raise AssertionError("only program methods open models")


@dataclass
class _Reader:
    """Reader of the numbers of a recipe.

    Attributes:
        recipe: the recipe.
        method: its method.
        experts: its models except the base.
        parameters: the parameters found so far.
    """

    recipe: Recipe
    method: Method
    experts: Sequence[Source]
    parameters: list[Parameter] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._document = YamlDocument(self.recipe.text, str(self.recipe.path))
        self._places: list[tuple[int, int]] = []  # of each parameter, in the text
        self._indices: dict[int, int] = {}  # of a node
        self._has_lists = self._normalized = False

    def tunable(self) -> Tunable:
        """Return the recipe with its numbers as parameters."""
        top = _entries(self._document, self._document.root)
        shared = _entries(self._document, top.get("parameters"))
        by_line = {
            self._document.line(item): _entries(
                self._document, _entries(self._document, item).get("parameters")
            )
            for item in top["models"].value
        }
        own = [by_line.get(source.line, {}) if source.parameters else {} for source in self.experts]
        labels = short_names([source.model for source in self.experts])
        schema = self.method.schema
        static = {
            p.name: self._static(p, shared.get(schema.recipe_key(p.name)))
            for p in self.method.hyperparameters
            if p.type not in ("float", "per_expert")
        }
        self._normalized = bool(static.get("normalize", False))
        patterns: dict[str, Pattern] = {}
        per_expert: dict[str, list[Pattern]] = {}
        for parameter in self.method.hyperparameters:
            key = schema.recipe_key(parameter.name)
            if parameter.type == "per_expert":
                per_expert[parameter.name] = [
                    self._pattern(parameter, [(nodes.get(key), label), (shared.get(key), "")])
                    for nodes, label in zip(own, labels, strict=True)
                ]
            elif parameter.type == "float":
                patterns[parameter.name] = self._pattern(parameter, [(shared.get(key), "")])
        patterned = PatternedAlgorithm(
            algorithm=self.method.bind(**static), shared=patterns, per_expert=per_expert
        )
        return Tunable(
            name=self.recipe.path.name,
            slots=default_slots(len(self.experts)),
            parameters=tuple(self.parameters),
            bind=patterned.bind,
            write=self._write,
            suffix=".yaml",
        )

    def checked(self, tunable: Tunable, models: ModelSet) -> Tunable:
        """Return the recipe if its lists have layers to run along."""
        if self._has_lists and models.num_layers < 2:
            raise UserError(
                f"{self.recipe.path}: lists of numbers run along the layers, but the models have "
                f"{models.num_layers or 'no recognized'} layer{'s' * (not models.num_layers)}; "
                "write single numbers"
            )
        return tunable

    def _write(self, values: Any) -> str:
        text = self.recipe.text
        replaced = zip(self._places, self.parameters, values, strict=True)
        for (start, end), parameter, value in sorted(replaced, key=lambda r: r[0], reverse=True):
            number = rounded(value)
            if number != parameter.start:
                text = text[:start] + _yaml_number(number) + text[end:]
        return text

    def _static(self, parameter: Hyperparameter, node: yaml.Node | None) -> Any:
        """Return the value of a hyperparameter that is not a number."""
        key = self.method.schema.recipe_key(parameter.name)
        if isinstance(node, yaml.SequenceNode | yaml.MappingNode):
            raise self._document.fail(
                node, f"{key}: tuning takes one value for all tensors; write a single value"
            )
        parameter_type = ParameterType(
            key=key, name=parameter.type, choices=self.method.schema.choices.get(parameter.name, {})
        )
        found = resolve(self.recipe.slices[0].levels, parameter_type, "", 0.0)
        default = self.method.schema.defaults.get(parameter.name, parameter.default)
        return default if found is None else found

    def _pattern(
        self, parameter: Hyperparameter, levels: Sequence[tuple[yaml.Node | None, str]]
    ) -> Pattern:
        """Return the pattern of a hyperparameter, of one expert if it has a value per expert.

        Args:
            parameter: the hyperparameter.
            levels: its values in the recipe, the innermost first, with a label for each.
        """
        entries: list[Entry] = []
        for node, label in levels:
            if node is None:
                continue
            entries += self._entries_of(parameter, node, label)
            if entries and entries[-1][0] is None:
                break
        else:
            schema = self.method.schema
            if not entries and parameter.name in schema.required:
                key = schema.recipe_key(parameter.name)
                label = levels[0][1]
                raise self.recipe.fail(
                    "merge_method",
                    f"{self.method.name} needs the parameter {key!r}{label and f' for {label}'}",
                )
            if parameter.name not in schema.required:
                default = schema.defaults.get(parameter.name, parameter.default)
                entries.append((None, (float(default),)))
        filters, numbers = zip(*entries, strict=True)
        return Pattern(numbers=numbers, filters=filters)

    def _entries_of(self, parameter: Hyperparameter, node: yaml.Node, label: str) -> list[Entry]:
        """Return the entries in a parameter's value, up to the first without a filter."""
        items = node.value if isinstance(node, yaml.SequenceNode) else [node]
        if not any(isinstance(item, yaml.MappingNode) for item in items):
            return [(None, self._numbers(parameter, node, label))]
        entries: list[Entry] = []
        for item in items:
            keys = self._document.mapping(item, "an entry", allowed=("value", "filter"))
            if "value" not in keys:
                raise self._document.fail(item, "an entry needs the key 'value'")
            pattern = self._document.value(keys["filter"]) if "filter" in keys else "*"
            text = None if pattern == "*" else str(pattern)
            place = ", ".join(part for part in (label, text) if part)
            entries.append((text, self._numbers(parameter, keys["value"], place)))
            if text is None:
                break
        return entries

    def _numbers(
        self, parameter: Hyperparameter, node: yaml.Node, label: str
    ) -> tuple[Number, ...]:
        """Return the numbers of a value: a single one, or one per item of a list."""
        if not isinstance(node, yaml.SequenceNode):
            return (self._number(parameter, node, label, single=True),)
        self._has_lists = self._has_lists or len(node.value) > 1
        count = len(node.value)
        if not count:
            raise self._document.fail(node, "a list of numbers must not be empty")
        return tuple(
            self._number(
                parameter,
                item,
                ", ".join(part for part in (label, f"{i + 1} of {count}") if part),
                single=False,
            )
            for i, item in enumerate(node.value)
        )

    def _number(
        self, parameter: Hyperparameter, node: yaml.Node, label: str, *, single: bool
    ) -> Number:
        """Return the index of the parameter at a node, or a number that stays."""
        if id(node) in self._indices:
            return self._indices[id(node)]
        value = self._float(node)
        if (value == 0 and single) or (0 < abs(value) <= SMALL and parameter.name != "t"):
            return value
        key = self.method.schema.recipe_key(parameter.name)
        low, high = bounds_of(self.method, parameter, value, normalized=self._normalized)
        name = f"{key}[{label}]" if label else key
        try:
            found = Parameter(name=name, start=value, low=low, high=high)
        except UserError as error:
            raise self._document.fail(node, str(error)) from None
        self._indices[id(node)] = len(self.parameters)
        self.parameters.append(found)
        start, end = node.start_mark.index, node.end_mark.index
        properties = _PROPERTIES.match(self.recipe.text[start:end])
        self._places.append((start + (properties.end() if properties else 0), end))
        return len(self.parameters) - 1

    def _float(self, node: yaml.Node) -> float:
        value = self._document.value(node)
        try:
            if isinstance(value, bool | list | dict) or value is None:
                raise ValueError
            return float(value)
        except (ValueError, OverflowError):
            raise self._document.fail(node, f"expected a number, found {value!r:.60}") from None


def _entries(document: YamlDocument, node: yaml.Node | None) -> dict[str, yaml.Node]:
    if node is None or not isinstance(node, yaml.MappingNode):
        return {}
    return {key: value for key, (_, value) in document.entries(node, "").items()}


def _yaml_number(number: float) -> str:
    """Return a number that YAML 1.1 reads as one: 1.0e-05, not 1e-05."""
    text = repr(number)
    mantissa, e, exponent = text.partition("e")
    return text if not e or "." in mantissa else f"{mantissa}.0e{exponent}"
