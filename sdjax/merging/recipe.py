"""Recipes: mergekit's YAML, read strictly, and bound to a method.

Read today: ``merge_method``, ``base_model``, ``models`` (each with ``model`` and ``parameters``),
``parameters``, ``dtype``, ``out_dtype``. The rest of mergekit's format is refused by name and line,
as is any unknown key: a key that is silently ignored is a wrong merge.

A recipe's meaning follows mergekit, so some defaults differ from the Python functions', which
follow the papers: ``density`` is 1, DARE rescales by the L1 ratio (``rescale_norm: density`` gives
the paper's), and ``weight`` must be given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sdjax.algorithms.registry import algorithm, methods
from sdjax.errors import UserError
from sdjax.merging.algorithm import Algorithm

DTYPES = ("bfloat16", "float16", "float32")

_KEYS = ("merge_method", "base_model", "models", "parameters", "dtype", "out_dtype")
_MODEL_KEYS = ("model", "parameters")
_LATER = (
    "slices",
    "modules",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
    "merge_options",
    "name",
)
_IGNORED = ("int8_mask",)  # mergekit's way to save memory; no mask is stored here
_WITHOUT_BASE = ("linear", "slerp")
_PER_MODEL_DEFAULTS = {"density": 1.0}
_DEFAULT_RESCALE_NORM = "l1"
_REQUIRED = ("weight", "t")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value and the line it stands on."""

    value: Any
    line: int


@dataclass(frozen=True, kw_only=True)
class ModelEntry:
    """One entry of ``models``."""

    model: str
    parameters: Mapping[str, Setting]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as written, checked for its form."""

    path: Path
    text: str
    merge_method: str
    base_model: str | None
    models: tuple[ModelEntry, ...]
    parameters: Mapping[str, Setting]
    dtype: str | None
    out_dtype: str | None


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe comes to.

    base: the model that task vectors are relative to, or None. experts: in slot order.
    template: the model whose config and tokenizer the result gets. dtype: of the result, or None
    for each tensor's own.
    """

    algorithm: Algorithm
    base: str | None
    experts: tuple[str, ...]
    template: str
    dtype: str | None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises UserError that names the key and the line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from error
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: no single YAML document: {problem}") from error
    reader = _Reader(path)
    top = reader.mapping(node, _KEYS, "a recipe")
    if "merge_method" not in top or "models" not in top:
        missing = "merge_method" if "merge_method" not in top else "models"
        raise UserError(f"{path}: the key {missing!r} is missing")
    method = reader.text(top["merge_method"], "merge_method")
    if method not in methods():
        known = ", ".join(methods())
        raise reader.fail(top["merge_method"], f"no merge_method {method!r}; there are: {known}")
    dtypes = {
        key: reader.choice(top[key], key, DTYPES) for key in ("dtype", "out_dtype") if key in top
    }
    return Recipe(
        path=path,
        text=text,
        merge_method=method,
        base_model=reader.text(top["base_model"], "base_model") if "base_model" in top else None,
        models=reader.models(top["models"]),
        parameters=reader.parameters(top.get("parameters")),
        dtype=dtypes.get("dtype"),
        out_dtype=dtypes.get("out_dtype"),
    )


def plan(recipe: Recipe) -> Plan:
    """Bind a recipe to its method. Raises UserError for what the method does not take or lacks."""
    name, base = recipe.merge_method, recipe.base_model
    entries = list(recipe.models)
    if name == "slerp":
        entries = _slerp_entries(recipe)
    elif name not in _WITHOUT_BASE:
        if base is None:
            raise UserError(f"{recipe.path}: {name} needs base_model")
        entries = [entry for entry in entries if entry.model != base]
    if not entries:
        raise UserError(f"{recipe.path}: models names no model but the base")
    template = base if base is not None else entries[0].model
    return Plan(
        algorithm=algorithm(name, **_hyperparameters(recipe, entries)),
        base=None if name in _WITHOUT_BASE else base,
        experts=tuple(entry.model for entry in entries),
        template=template,
        dtype=recipe.out_dtype or recipe.dtype,
    )


def _slerp_entries(recipe: Recipe) -> list[ModelEntry]:
    """As in mergekit: exactly two models, of which base_model is the end at t = 0."""
    others = [entry for entry in recipe.models if entry.model != recipe.base_model]
    if recipe.base_model is None or len(others) != 1:
        raise UserError(f"{recipe.path}: slerp needs base_model and exactly one other model")
    return [ModelEntry(model=recipe.base_model, parameters={}), *others]


def _hyperparameters(recipe: Recipe, entries: list[ModelEntry]) -> dict[str, Any]:
    described = {p.name: p for p in methods()[recipe.merge_method].parameters}
    per_expert = {name for name, p in described.items() if p.type == "per_expert"}
    names = {_recipe_name(name) for name in described} | ({"rescale"} & set(described))

    def refuse_unknown(given: Mapping[str, Setting], allowed: set[str], where: str) -> None:
        for key, setting in given.items():
            if key not in allowed and key not in _IGNORED:
                raise UserError(
                    f"{recipe.path}, line {setting.line}: {recipe.merge_method} has no parameter "
                    f"{key!r} {where}; allowed: {', '.join(sorted(allowed)) or 'none'}"
                )

    refuse_unknown(recipe.parameters, names, "for the whole merge")
    for entry in recipe.models:
        refuse_unknown(entry.parameters, per_expert, "for one model")
    bound: dict[str, Any] = {}
    for name in described:
        if name in per_expert:
            bound[name] = tuple(_of_model(recipe, entry, name) for entry in entries)
        elif name == "rescale" and recipe.merge_method.startswith("dare"):
            bound[name] = _rescale(recipe)
        elif _recipe_name(name) in recipe.parameters:
            bound[name] = _value(
                recipe, recipe.parameters[_recipe_name(name)], described[name].type
            )
        elif name in _REQUIRED:
            raise UserError(f"{recipe.path}: {recipe.merge_method} needs the parameter {name!r}")
    return bound


def _recipe_name(name: str) -> str:
    """mergekit's name for a hyperparameter of ours."""
    return {"scale": "lambda", "rescale": "rescale_norm"}.get(name, name)


def _of_model(recipe: Recipe, entry: ModelEntry, name: str) -> float:
    setting = entry.parameters.get(name) or recipe.parameters.get(name)
    if setting is not None:
        return _value(recipe, setting, "float")
    if name in _PER_MODEL_DEFAULTS:
        return _PER_MODEL_DEFAULTS[name]
    raise UserError(
        f"{recipe.path}: {recipe.merge_method} needs the parameter {name!r} for {entry.model}"
    )


def _rescale(recipe: Recipe) -> str:
    switch = recipe.parameters.get("rescale")
    if switch is not None and not _value(recipe, switch, "bool"):
        return "none"
    norm = recipe.parameters.get("rescale_norm")
    if norm is None:
        return _DEFAULT_RESCALE_NORM
    if norm.value not in ("l1", "density"):
        raise UserError(
            f"{recipe.path}, line {norm.line}: rescale_norm must be l1 or density, not {norm.value}"
        )
    return norm.value


def _value(recipe: Recipe, setting: Setting, kind: str) -> Any:
    value = setting.value
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind == "float" and number:
        return float(value)
    if kind == "bool" and (isinstance(value, bool) or value in (0, 1)):
        return bool(value)
    if kind == "str" and isinstance(value, str):
        return value
    words = {"float": "number", "bool": "true or false", "int": "whole number", "str": "text"}
    what = "a list (a gradient or filters), which is not supported yet"
    shown = what if isinstance(value, list) else repr(value)
    raise UserError(f"{recipe.path}, line {setting.line}: expected {words[kind]}, found {shown}")


class _Reader:
    """YAML nodes to values, with the file and line in every error."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def line(self, node: yaml.Node) -> int:
        return node.start_mark.line + 1

    def fail(self, node: yaml.Node | None, message: str) -> UserError:
        where = f"{self.path}, line {self.line(node)}" if node is not None else str(self.path)
        return UserError(f"{where}: {message}")

    def entries(self, node: yaml.Node | None, what: str) -> dict[str, tuple[int, yaml.Node]]:
        """Key to (line of the key, value node)."""
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} must be a mapping of keys to values")
        out: dict[str, tuple[int, yaml.Node]] = {}
        for key_node, value in node.value:
            key = str(key_node.value)
            if key in out:
                raise self.fail(key_node, f"the key {key!r} stands here a second time")
            out[key] = (self.line(key_node), value)
        return out

    def mapping(
        self, node: yaml.Node | None, allowed: tuple[str, ...], what: str
    ) -> dict[str, yaml.Node]:
        entries = self.entries(node, what)
        for key, (line, _) in entries.items():
            if key in _LATER and what == "a recipe":
                raise UserError(f"{self.path}, line {line}: {key!r} is not supported yet")
            if key not in allowed:
                raise UserError(
                    f"{self.path}, line {line}: unknown key {key!r}; allowed: {', '.join(allowed)}"
                )
        return {key: value for key, (_, value) in entries.items()}

    def text(self, node: yaml.Node, key: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise self.fail(node, f"{key} must be text")
        return str(node.value)

    def choice(self, node: yaml.Node, key: str, allowed: tuple[str, ...]) -> str:
        value = self.text(node, key)
        if value not in allowed:
            raise self.fail(node, f"{key} must be one of {', '.join(allowed)}, not {value!r}")
        return value

    def models(self, node: yaml.Node) -> tuple[ModelEntry, ...]:
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fail(node, "models must be a list of entries `- model: PATH`")
        out = []
        for item in node.value:
            keys = self.mapping(item, _MODEL_KEYS, "an entry of models")
            if "model" not in keys:
                raise self.fail(item, "the key 'model' is missing")
            parameters = self.parameters(keys.get("parameters"))
            out.append(ModelEntry(model=self.text(keys["model"], "model"), parameters=parameters))
        return tuple(out)

    def parameters(self, node: yaml.Node | None) -> dict[str, Setting]:
        if node is None:
            return {}
        out = {}
        for key, (line, value) in self.entries(node, "parameters").items():
            loaded = yaml.safe_load(yaml.serialize(value))
            out[key] = Setting(value=loaded, line=line)
        return out
