"""Recipes: mergekit's YAML, read strictly into one form.

However a recipe is written (``models``, ``slices``, or ``modules`` with either), it comes to a list
of slices: layers of some models, merged into as many layers of the result. What is not supported
yet is refused by name and line, as is any unknown key: a key that is silently ignored is a wrong
merge. What a recipe means for a method and for given models is ``plan.py``'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import yaml

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.yaml import YamlDocument
from sdjax.merging.recipe.parameters import ParameterMap, ParameterValue

DTYPES = ("bfloat16", "float16", "float32")

_CONTENTS = ("models", "slices", "modules")
_KEYS = (
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
_LATER = ("merge_options", "name")


@dataclass(frozen=True, kw_only=True)
class Source:
    """Layers of one model: ``layers`` as [first, behind the last), all of them where it is None."""

    model: str
    layers: tuple[int, int] | None
    parameters: ParameterMap
    line: int


@dataclass(frozen=True, kw_only=True)
class Slice:
    """Layers of the result: the sources are merged layer by layer. ``base_model`` may be its own.

    levels: the parameters that hold for every source, the nearest first.
    """

    sources: tuple[Source, ...]
    base_model: str | None
    levels: tuple[ParameterMap, ...]
    line: int


@dataclass(frozen=True, kw_only=True)
class TokenizerChoice:
    """``source``: "base", "union" or a model. The vocabulary is filled up to a multiple."""

    source: str
    line: int
    pad_to_multiple_of: int = 1


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe as written, checked for its form.

    lines: of its keys. whole: whether it names whole models, so that the base belongs to them even
    if it is not named.
    """

    path: Path
    text: str
    lines: Mapping[str, int]
    merge_method: str
    base_model: str | None
    whole: bool
    slices: tuple[Slice, ...]
    dtype: str | None
    out_dtype: str | None
    tokenizer: TokenizerChoice | None
    chat_template: str | None

    def fail(self, at: str | int, message: str) -> UserError:
        """The error, with the line; ``at``: a key of the recipe, or the line itself."""
        line = self.lines[at] if isinstance(at, str) else at
        return UserError(f"{self.path}, line {line}: {message}")

    def models(self) -> tuple[str, ...]:
        """Every model that is named, once, the base first."""
        named = [self.base_model] if self.base_model else []
        named += [one for part in self.slices for one in _named(part)]
        return tuple(dict.fromkeys(named))


def _named(part: Slice) -> Iterable[str]:
    if part.base_model:
        yield part.base_model
    for source in part.sources:
        yield source.model


def read_recipe(path: Path) -> Recipe:
    """Read a recipe. Raises UserError that names the key and the line."""
    document = _RecipeDocument.read(path)
    top = document.mapping(document.root, "a recipe", allowed=_KEYS, unsupported=_LATER)
    if "merge_method" not in top:
        raise document.fail(None, "the key 'merge_method' is missing")
    contents = [key for key in _CONTENTS if key in top]
    if len(contents) != 1:
        found = " and ".join(contents) or "none of them"
        raise document.fail(None, f"one of models, slices and modules must be there, not {found}")
    if "tokenizer" in top and "tokenizer_source" in top:
        raise document.fail(
            top["tokenizer"], "tokenizer and tokenizer_source say the same; drop one"
        )
    parameters = document.parameters(top.get("parameters"))
    whole, slices = document.contents(top, (parameters,))
    return Recipe(
        path=path,
        text=document.text,
        lines={key: document.line(value) for key, value in top.items()},
        merge_method=document.string(top["merge_method"], "merge_method"),
        base_model=document.model(top["base_model"], "base_model") if "base_model" in top else None,
        whole=whole,
        slices=slices,
        dtype=document.dtype(top, "dtype"),
        out_dtype=document.dtype(top, "out_dtype"),
        tokenizer=document.tokenizer(top),
        chat_template=document.string(top["chat_template"], "chat_template")
        if "chat_template" in top
        else None,
    )


class _RecipeDocument(YamlDocument):
    """The parts of a recipe."""

    def contents(
        self, keys: Mapping[str, yaml.Node], levels: tuple[ParameterMap, ...]
    ) -> tuple[bool, tuple[Slice, ...]]:
        """(whether whole models are named, slices) of a recipe or a module."""
        if "modules" in keys:
            modules = self.entries(keys["modules"], "modules")
            for name, (line, _) in modules.items():
                if name != "default":
                    raise self.fail(
                        line, f"no module {truncated_repr(name)}; a language model has one: default"
                    )
            if not modules:
                raise self.fail(keys["modules"], "modules must have the entry default")
            allowed = ("models", "slices", "parameters")
            inside = self.mapping(modules["default"][1], "a module", allowed=allowed)
            if ("models" in inside) == ("slices" in inside):
                raise self.fail(modules["default"][0], "a module has either models or slices")
            return self.contents(inside, (self.parameters(inside.get("parameters")), *levels))
        if "models" in keys:
            node = keys["models"]
            sources = tuple(
                self.source(item, "an entry of models", ("model", "parameters"))
                for item in self.items(node, "models must be a list of entries `- model: PATH`")
            )
            line = self.line(node)
            return True, (Slice(sources=sources, base_model=None, levels=levels, line=line),)
        items = self.items(keys["slices"], "slices must be a list of entries `- sources: [...]`")
        return False, tuple(self.slice(item, levels) for item in items)

    def slice(self, node: yaml.Node, levels: tuple[ParameterMap, ...]) -> Slice:
        allowed = ("sources", "base_model", "parameters")
        keys = self.mapping(node, "a slice", allowed=allowed, unsupported=("residual_weight",))
        if "sources" not in keys:
            raise self.fail(node, "the key 'sources' is missing")
        items = self.items(keys["sources"], "sources must be a list of entries `- model: PATH`")
        inner = ("model", "layer_range", "parameters")
        return Slice(
            sources=tuple(self.source(item, "a source", inner) for item in items),
            base_model=self.model(keys["base_model"], "base_model")
            if "base_model" in keys
            else None,
            levels=(self.parameters(keys.get("parameters")), *levels),
            line=self.line(node),
        )

    def source(self, node: yaml.Node, what: str, allowed: tuple[str, ...]) -> Source:
        keys = self.mapping(node, what, allowed=allowed)
        for key in allowed[:-1]:
            if key not in keys:
                raise self.fail(node, f"the key {key!r} is missing")
        layers = None
        if "layer_range" in keys:
            message = "layer_range must be two whole numbers, [first, behind the last]"
            ends = [
                self.integer(n, "layer_range") for n in self.items(keys["layer_range"], message)
            ]
            if len(ends) != 2 or ends[0] >= ends[1]:
                raise self.fail(keys["layer_range"], message)
            layers = (ends[0], ends[1])
        return Source(
            model=self.model(keys["model"], "model"),
            layers=layers,
            parameters=self.parameters(keys.get("parameters")),
            line=self.line(node),
        )

    def model(self, node: yaml.Node, key: str) -> str:
        """MODEL or MODEL+ADAPTER, which a mapping may give as ``model`` and ``lora``."""
        if not isinstance(node, yaml.MappingNode):
            return self.string(node, key)
        unsupported = ("override_architecture",)
        parts = self.mapping(node, key, allowed=("model", "lora"), unsupported=unsupported)
        if "model" not in parts:
            raise self.fail(node, f"{key} as a mapping must have the key 'model'")
        return "+".join(self.place(parts[one], one) for one in ("model", "lora") if one in parts)

    def place(self, node: yaml.Node, key: str) -> str:
        """PATH or PATH@REVISION, which a mapping may give as ``path`` and ``revision``."""
        if not isinstance(node, yaml.MappingNode):
            return self.string(node, key)
        parts = self.mapping(node, key, allowed=("path", "revision"))
        if "path" not in parts:
            raise self.fail(node, f"{key} as a mapping must have the key 'path'")
        return "@".join(
            self.string(parts[one], one) for one in ("path", "revision") if one in parts
        )

    def parameters(self, node: yaml.Node | None) -> dict[str, ParameterValue]:
        if node is None:
            return {}
        return {
            key: ParameterValue(key=key, value=self.value(value), line=line, path=self.name)
            for key, (line, value) in self.entries(node, "parameters").items()
        }

    def dtype(self, keys: Mapping[str, yaml.Node], key: str) -> str | None:
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
            if multiple == 0:
                raise self.fail(inside["pad_to_multiple_of"], "pad_to_multiple_of must not be 0")
        source = self.model(inside["source"], "source") if "source" in inside else "union"
        line = self.line(inside.get("source", keys["tokenizer"]))
        return TokenizerChoice(source=source, line=line, pad_to_multiple_of=multiple)
