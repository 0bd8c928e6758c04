"""Recipes of tuned merges: mergekit 0.1.5's YAML for a method whose numbers follow patterns.

Lists are gradients along the layers and `filter` selects a kind of tensor; the format is described
in `sdjax.merging.recipe.parameters`. Tensors outside the scope have weight 0, which leaves the base
unchanged.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import yaml

from sdjax.core.errors import UserError
from sdjax.merging.method import Method
from sdjax.models.tensor_names import parse_name
from sdjax.tuning.model_set import ModelSet, filter_of
from sdjax.tuning.patterns import PatternedAlgorithm


def recipe_text(
    method: Method, patterned: PatternedAlgorithm, models: ModelSet, values: Any
) -> str:
    """Return the recipe whose merge equals the merge in memory at some values [parameters]."""
    schema, algorithm = method.schema, patterned.algorithm
    shared: dict[str, Any] = {
        schema.recipe_key(name): value for name, value in algorithm.hyperparameters.items()
    }
    for name in patterned.per_expert:
        del shared[schema.recipe_key(name)]
    for name, pattern in patterned.shared.items():
        shared[schema.recipe_key(name)] = pattern.yaml(values)
    switch = _switch(method)
    if switch not in patterned.per_expert and switch is not None:
        key = schema.recipe_key(switch)
        shared[key] = _only_in_scope(shared[key], models)
    entries = []
    for i, model in enumerate(models.experts.values()):
        own = {
            schema.recipe_key(name): patterns[i].yaml(values)
            for name, patterns in patterned.per_expert.items()
        }
        if switch in own:
            own[switch] = _only_in_scope(own[switch], models)
        entries.append({"model": model, **({"parameters": own} if own else {})})
    data: dict[str, Any] = {
        "merge_method": method.name,
        "base_model": models.base or "base",
        "models": entries,
        "parameters": shared,
    }
    if models.dtype is not None:
        data["dtype"] = models.dtype
    return dump_yaml(data)


def dump_yaml(data: Any) -> str:
    """Return data as YAML: no aliases, and a list of numbers on one line."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def check_scope(method: Method, models: ModelSet) -> None:
    """Raise UserError if a recipe cannot leave the tensors outside the scope unchanged."""
    if len(models.in_scope) < len(models.paths) and not _switch(method):
        raise UserError(
            f"{method.name}: its recipes always merge all tensors, so that the result cannot be "
            "written; use --scope all"
        )


def _switch(method: Method) -> str | None:
    """Return the hyperparameter that leaves the base unchanged where it is 0, if there is one."""
    names = {p.name for p in method.hyperparameters}
    if method.schema.base != "required":
        return None
    return next((name for name in ("weight", "scale") if name in names), None)


def _only_in_scope(value: Any, models: ModelSet) -> Any:
    """Return the value of a parameter in a recipe, with 0 for tensors outside the scope."""
    outside = set(models.paths) - set(models.in_scope)
    if not outside:
        return value
    others = [parse_name(path).spellings[-1] for path in outside]
    by_kind = isinstance(value, list) and any(isinstance(item, Mapping) for item in value)
    entries = value if by_kind else []
    for place in map(parse_name, models.in_scope):
        text = filter_of(place)
        if any(text in name for name in others):  # only in some layers
            text = place.spellings[-1]
        if not by_kind and {"filter": text, "value": value} not in entries:
            entries.append({"filter": text, "value": value})
        elif by_kind and text == place.spellings[-1] and place.layer is not None:
            raise UserError(
                f"kinds: a recipe cannot express the scope {models.scope!r}, which has {text} and "
                "not the same tensor of all layers; use the family layers, or another scope"
            )
    return [*entries, {"value": 0.0}]


class _Dumper(yaml.SafeDumper):
    """Dumper of `dump_yaml`."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return whether a value that occurs twice is written twice."""
        return True


def _represent_list(dumper: yaml.SafeDumper, items: list[Any]) -> yaml.Node:
    numbers = all(isinstance(item, int | float) for item in items)
    return dumper.represent_sequence("tag:yaml.org,2002:seq", items, flow_style=numbers)


_Dumper.add_representer(list, _represent_list)
