"""Recipes: mergekit's YAML, parsed strictly into one form.

Every way of writing a recipe (`models`, `slices`, or `modules` with either) yields a list of
slices: layers of some models, merged into the same number of layers of the result. Keys that
mergekit passes over give a note if they mean nothing, and an error if they look misspelled or would
have meant something, because ignoring those would produce a wrong merge. `recipe_plan.py` turns a
recipe into a merge plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from sdjax.core.errors import UserError, closest_name, did_you_mean, truncated_repr
from sdjax.core.yaml import YamlDocument
from sdjax.merging.recipe.parameters import ParameterMap, ParameterValue

DTYPES = ("bfloat16", "float16", "float32", "float64")

MAX_PADDING = 2**16  # of a vocabulary's size; every row of the padding is allocated

_CONTENTS = ("models", "slices", "modules")
TOP_LEVEL_KEYS = (
    "merge_method",
    "base_model",
    *_CONTENTS,
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)


@dataclass(frozen=True, kw_only=True)
class Source:
    """Layers of one model.

    Attributes:
        model: name of the model.
        layers: half-open range of layers, or None for all of them.
        ignored_layers: half-open range of layers next to a whole model, which mergekit ignores.
        parameters: parameters of this model.
        line: line in the recipe.
    """

    model: str
    layers: tuple[int, int] | None
    parameters: ParameterMap
    line: int
    ignored_layers: tuple[int, int] | None = None


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Layers of the result, merged layer by layer from the sources.

    Attributes:
        sources: the models and their layers.
        base_model: overrides the recipe's.
        levels: parameters that apply to every source, the innermost level first.
        line: line in the recipe.
    """

    sources: tuple[Source, ...]
    base_model: str | None
    levels: tuple[ParameterMap, ...]
    line: int


@dataclass(frozen=True, kw_only=True)
class TokenizerChoice:
    """Choice of the result's tokenizer.

    Attributes:
        source: "base", "union" or a model.
        line: line in the recipe.
        pad_to_multiple_of: the number of embedding rows is padded to a multiple of it.
    """

    source: str
    line: int
    pad_to_multiple_of: int = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed recipe.

    Attributes:
        path: its file.
        text: its text.
        lines: line of each top-level key.
        merge_method: name of the method.
        base_model: name of the base, if any.
        whole_models: whether it lists whole models, so that the base takes part even if it is not
            listed.
        slices: the slices, in the order of the result's layers.
        dtype: dtype in which the result is stored, unless `out_dtype` is set.
        out_dtype: dtype in which the result is stored.
        tokenizer: choice of the tokenizer.
        chat_template: "auto", a template's name or a Jinja template.
        notes: remarks for the user.
    """

    path: Path
    text: str
    lines: Mapping[str, int]
    merge_method: str
    base_model: str | None
    whole_models: bool
    slices: tuple[Slice, ...]
    dtype: str | None
    out_dtype: str | None
    tokenizer: TokenizerChoice | None
    chat_template: str | None
    notes: tuple[str, ...] = ()

    def fail(self, at: str | int, message: str) -> UserError:
        """Return the error for a top-level key or a line number."""
        line = self.lines[at] if isinstance(at, str) else at
        return UserError(f"{self.path}, line {line}: {message}")

    def line_of(self, model: str) -> int:
        """Return the line of the first source with this model, or that of `base_model`."""
        sources = (source for part in self.slices for source in part.sources)
        lines = [source.line for source in sources if source.model == model]
        return lines[0] if lines else self.lines["base_model"]

    def models(self) -> tuple[str, ...]:
        """Return the names of all models without duplicates, the base first."""
        names = [self.base_model]
        for part in self.slices:
            names += [part.base_model, *(source.model for source in part.sources)]
        return tuple(dict.fromkeys(name for name in names if name))


def read_recipe(path: Path) -> Recipe:
    """Parse a recipe.

    Raises:
        UserError: an invalid recipe; the message names the key and the line.
    """
    return _parsed(_RecipeDocument.read(path), path)


def parse_recipe(text: str, path: Path) -> Recipe:
    """Parse the text of a recipe.

    Args:
        text: the recipe.
        path: its file, which need not exist: names of models are relative to its folder.

    Raises:
        UserError: as in `read_recipe`.
    """
    return _parsed(_RecipeDocument(text, str(path)), path)


def _parsed(document: _RecipeDocument, path: Path) -> Recipe:
    top = document.top()
    if "merge_method" not in top:
        raise document.fail(None, "the key 'merge_method' is missing")
    contents = [key for key in _CONTENTS if key in top]
    if len(contents) != 1:
        found = " and ".join(contents) or "none of them"
        raise document.fail(
            None, f"exactly one of models, slices and modules is needed, found {found}"
        )
    if "tokenizer" in top and "tokenizer_source" in top:
        raise document.fail(
            top["tokenizer"], "tokenizer and tokenizer_source are mutually exclusive; remove one"
        )
    parameters = document.parameters(top.get("parameters"))
    whole_models, slices = document.contents(top, (parameters,))
    chat_template = top.get("chat_template")
    return Recipe(
        path=path,
        text=document.text,
        lines={key: document.line(value) for key, value in top.items()},
        merge_method=document.string(top["merge_method"], "merge_method"),
        base_model=document.model(top["base_model"], "base_model") if "base_model" in top else None,
        whole_models=whole_models,
        slices=slices,
        dtype=document.dtype(top, "dtype"),
        out_dtype=document.dtype(top, "out_dtype"),
        tokenizer=document.tokenizer(top),
        chat_template=None
        if chat_template is None
        else document.string(chat_template, "chat_template"),
        notes=tuple(document.notes),
    )


class _RecipeDocument(YamlDocument):
    """A recipe's YAML document.

    Attributes:
        notes: remarks for the user.
    """

    def __init__(self, text: str, name: str, *, show_lines: bool = True) -> None:
        """Parse a document, as `YamlDocument` does."""
        self.notes: list[str] = []
        super().__init__(text, name, show_lines=show_lines)

    def note(self, line: int, message: str) -> None:
        """Add a remark on a line."""
        note = f"{self.name}, line {line}: {message}"
        if note not in self.notes:
            self.notes.append(note)

    def check_duplicate(self, key: yaml.ScalarNode, value: yaml.Node) -> None:
        """Accept the last value of a key, as mergekit does, if it is a string or a number."""
        if not isinstance(value, yaml.ScalarNode):
            super().check_duplicate(key, value)
        self.note(self.line(key), f"duplicate key {truncated_repr(key.value)}; the last one counts")

    def top(self) -> dict[str, yaml.Node]:
        """Return the top-level keys and their values, without those that mean nothing."""
        entries = self.entries(self.root, "a recipe")
        for key, (line, _) in entries.items():
            if key in TOP_LEVEL_KEYS:
                continue
            if closest_name(key, TOP_LEVEL_KEYS) is not None:
                listed = f"allowed: {', '.join(TOP_LEVEL_KEYS)}"
                hint = did_you_mean(key, TOP_LEVEL_KEYS, listed)
                raise self.fail(line, f"unknown key {truncated_repr(key)}; {hint}")
            self.note(line, f"the key {truncated_repr(key)} means nothing; ignored")
        values = self.mapping(self.root, "a recipe", allowed=tuple(entries))  # without null
        return {key: value for key, value in values.items() if key in TOP_LEVEL_KEYS}

    def contents(
        self, keys: Mapping[str, yaml.Node], levels: tuple[ParameterMap, ...]
    ) -> tuple[bool, tuple[Slice, ...]]:
        """Return whether whole models are listed, and the slices, of a recipe or a module."""
        if "modules" in keys:
            modules = self.entries(keys["modules"], "modules")
            for name, (line, _) in modules.items():
                if name != "default":
                    raise self.fail(
                        line,
                        f"no module {truncated_repr(name)}; language models have only 'default'",
                    )
            if not modules:
                raise self.fail(keys["modules"], "modules must have the entry 'default'")
            allowed = ("models", "slices", "parameters")
            inside = self.mapping(modules["default"][1], "a module", allowed=allowed)
            if ("models" in inside) == ("slices" in inside):
                raise self.fail(modules["default"][0], "a module needs either models or slices")
            return self.contents(inside, (self.parameters(inside.get("parameters")), *levels))
        if "models" in keys:
            node = keys["models"]
            sources = tuple(
                self.source(item, whole=True)
                for item in self.items(node, "models must be a list of entries `- model: PATH`")
            )
            line = self.line(node)
            return True, (Slice(sources=sources, base_model=None, levels=levels, line=line),)
        items = self.items(keys["slices"], "slices must be a list of entries `- sources: [...]`")
        return False, tuple(self.slice(item, levels) for item in items)

    def slice(self, node: yaml.Node, levels: tuple[ParameterMap, ...]) -> Slice:
        """Return an entry of `slices`."""
        allowed = ("sources", "base_model", "parameters")
        keys = self.mapping(node, "a slice", allowed=allowed, unsupported=("residual_weight",))
        if "sources" not in keys:
            raise self.fail(node, "the key 'sources' is missing")
        items = self.items(keys["sources"], "sources must be a list of entries `- model: PATH`")
        base_model = keys.get("base_model")
        return Slice(
            sources=tuple(self.source(item) for item in items),
            base_model=None if base_model is None else self.model(base_model, "base_model"),
            levels=(self.parameters(keys.get("parameters")), *levels),
            line=self.line(node),
        )

    def source(self, node: yaml.Node, *, whole: bool = False) -> Source:
        """Return an entry of `models`, which lists whole models, or of `sources`."""
        name = "an entry of models" if whole else "a source"
        keys = self.mapping(node, name, allowed=("model", "layer_range", "parameters"))
        for key in ("model",) if whole else ("model", "layer_range"):
            if key not in keys:
                raise self.fail(node, f"the key {key!r} is missing")
        layers = self.layers(keys["layer_range"]) if "layer_range" in keys else None
        return Source(
            model=self.model(keys["model"], "model"),
            layers=None if whole else layers,
            ignored_layers=layers if whole else None,
            parameters=self.parameters(keys.get("parameters")),
            line=self.line(node),
        )

    def layers(self, node: yaml.Node) -> tuple[int, int]:
        """Return a half-open range of layers."""
        message = "layer_range must be two integers, [start, end), with start <= end"
        ends = [self.integer(item, "layer_range") for item in self.items(node, message)]
        if len(ends) != 2 or ends[0] > ends[1]:
            raise self.fail(node, message)
        return ends[0], ends[1]

    def model(self, node: yaml.Node, key: str) -> str:
        """Return MODEL or MODEL+ADAPTER, also from a mapping with `model` and `lora`."""
        return self._joined(node, key, ("model", "lora"), "+", ("override_architecture",))

    def _joined(
        self,
        node: yaml.Node,
        key: str,
        names: tuple[str, str],
        separator: str,
        unsupported: tuple[str, ...] = (),
    ) -> str:
        """Return a string, or the values of a mapping's two keys joined by a separator."""
        if not isinstance(node, yaml.MappingNode):
            return self.string(node, key)
        parts = self.mapping(node, key, allowed=names, unsupported=unsupported)
        if names[0] not in parts:
            raise self.fail(node, f"{key} as a mapping must have the key {names[0]!r}")
        if names[0] == "path":
            return separator.join(self.string(parts[n], n) for n in names if n in parts)
        return separator.join(
            self._joined(parts[n], n, ("path", "revision"), "@") for n in names if n in parts
        )

    def parameters(self, node: yaml.Node | None) -> dict[str, ParameterValue]:
        """Return the entries of `parameters`, if there are any."""
        if node is None:
            return {}
        return {
            key: ParameterValue(key=key, value=self.value(value), line=line, path=self.name)
            for key, (line, value) in self.entries(node, "parameters").items()
        }

    def dtype(self, keys: Mapping[str, yaml.Node], key: str) -> str | None:
        """Return the dtype of a key, or None."""
        if key not in keys:
            return None
        name = self.string(keys[key], key).removeprefix("torch.")
        if name not in DTYPES:
            allowed = ", ".join(DTYPES)
            raise self.fail(
                keys[key], f"{key} must be one of {allowed}, not {truncated_repr(name)}"
            )
        return name

    def tokenizer(self, keys: Mapping[str, yaml.Node]) -> TokenizerChoice | None:
        """Return the choice made by `tokenizer_source` or `tokenizer`, or None."""
        if "tokenizer_source" in keys:
            node = keys["tokenizer_source"]
            source = self.model(node, "tokenizer_source")
            return TokenizerChoice(source=source, line=self.line(node))
        if "tokenizer" not in keys:
            return None
        inside = self.mapping(
            keys["tokenizer"],
            "tokenizer",
            allowed=("source", "pad_to_multiple_of"),
            unsupported=("tokens",),
        )
        multiple = 1
        if "pad_to_multiple_of" in inside:
            multiple = self.integer(inside["pad_to_multiple_of"], "pad_to_multiple_of")
            if not 1 <= multiple <= MAX_PADDING:
                message = f"pad_to_multiple_of must be from 1 to {MAX_PADDING:,}, not {multiple}"
                raise self.fail(inside["pad_to_multiple_of"], message)
        source = self.model(inside["source"], "source") if "source" in inside else "union"
        line = self.line(inside.get("source", keys["tokenizer"]))
        return TokenizerChoice(source=source, line=line, pad_to_multiple_of=multiple)
