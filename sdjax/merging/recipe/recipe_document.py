"""YAML document of a recipe in mergekit's format, checked strictly.

Keys that mergekit passes over give a note if they mean nothing, and an error if they look
misspelled or would have meant something, because ignoring those would produce a wrong merge.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import yaml

from sdjax.core.errors import closest_name, did_you_mean, truncated_repr
from sdjax.core.yaml import YamlDocument
from sdjax.merging.recipe.parameters import ParameterMap, ParameterValue
from sdjax.merging.recipe.schema import (
    DEFAULT,
    DTYPES,
    Module,
    Slice,
    Source,
    TokenizerChoice,
    TokenRow,
)

MAX_PADDING = 2**16  # of a vocabulary's size; every row of the padding is allocated

CONTENTS = ("models", "slices", "modules")
TOP_LEVEL_KEYS = (
    "merge_method",
    "base_model",
    *CONTENTS,
    "parameters",
    "dtype",
    "out_dtype",
    "tokenizer_source",
    "tokenizer",
    "chat_template",
)
# Keys of a model that would change the merge if they were not ignored: its parameters.
_MISPLACED = ("weight", "density", "gamma", "epsilon", "scale", "t")


class RecipeDocument(YamlDocument):
    """A recipe's YAML document.

    Attributes:
        notes: remarks for the user.
        architectures: model to the architecture that overrides that of its config.
        depends: names of the recipes whose results are used.
    """

    def __init__(
        self,
        text: str,
        name: str,
        *,
        show_lines: bool = True,
        folders: Mapping[str, str] | None = None,
    ) -> None:
        """Parse a document, as `YamlDocument` does.

        Args:
            text: the YAML text.
            name: name of the document in error messages.
            show_lines: whether error messages contain line numbers.
            folders: name of a recipe to the folder of its result; None if the file has only one
                recipe, whose name then means nothing.
        """
        self.notes: list[str] = []
        self.architectures: dict[str, str] = {}
        self.depends: dict[str, None] = {}
        self._folders = folders or {}
        self._top_level_keys = (*TOP_LEVEL_KEYS, *(["name"] if folders is not None else []))
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
        """Return the top-level keys and their values, without those that mean nothing.

        A misspelled one gives a note too: published recipes have them, and mergekit ignores them.
        Without `merge_method` it is an error, since the file is probably not a recipe.
        """
        lenient = "merge_method" in self.entries(self.root, "a recipe")
        return self.known(self.root, "a recipe", self._top_level_keys, lenient=lenient)

    def known(
        self,
        node: yaml.Node | None,
        name: str,
        allowed: tuple[str, ...],
        misplaced: tuple[str, ...] = (),
        *,
        lenient: bool = False,
    ) -> dict[str, yaml.Node]:
        """Return the allowed keys of a mapping and their values, without those that are null.

        A key that means nothing gives a note; a misplaced or misspelled one is an error. So is
        `revision` anywhere, since other weights than meant would be merged.

        Args:
            node: a mapping node.
            name: name of the node in error messages.
            allowed: the keys that it may have.
            misplaced: keys that would mean something elsewhere.
            lenient: whether a misspelled key gives a note.
        """
        entries = self.entries(node, name)
        for key, (line, _) in entries.items():
            if key in allowed:
                continue
            similar = closest_name(key, allowed)
            advice = None
            if key == "revision":
                advice = "write the model as MODEL@REVISION"
            elif key in misplaced:
                advice = f"write it under parameters: {{{key}: ...}}"
            elif similar is not None and not lenient:
                advice = did_you_mean(key, allowed, f"allowed: {', '.join(allowed)}")
            if advice is not None:
                raise self.fail(line, f"unknown key {truncated_repr(key)}; {advice}")
            hint = "" if similar is None else f" (did you mean {similar}?)"
            self.note(line, f"the key {truncated_repr(key)} means nothing{hint}; ignored")
        values = self.mapping(node, name, allowed=tuple(entries))  # without null
        return {key: value for key, value in values.items() if key in allowed}

    def modules(self, node: yaml.Node, levels: tuple[ParameterMap, ...]) -> tuple[Module, ...]:
        """Return the entries of `modules`."""
        entries = self.entries(node, "modules")
        if not entries:
            raise self.fail(node, f"modules must have an entry, such as {DEFAULT!r}")
        modules = []
        for name, (line, value) in entries.items():
            keys = self.known(value, "a module", ("models", "slices", "parameters"))
            if ("models" in keys) == ("slices" in keys):
                raise self.fail(line, "a module needs either models or slices")
            own = self.parameters(keys.get("parameters"))
            slices = self.contents(keys, (own, *levels))
            modules.append(Module(name=name, slices=slices, line=line))
        return tuple(modules)

    def contents(
        self, keys: Mapping[str, yaml.Node], levels: tuple[ParameterMap, ...]
    ) -> tuple[Slice, ...]:
        """Return the slices of a recipe or a module that has `models` or `slices`."""
        if "models" in keys:
            node = keys["models"]
            sources = tuple(
                self.source(item, whole=True)
                for item in self.items(node, "models must be a list of entries `- model: PATH`")
            )
            line = self.line(node)
            return (
                Slice(
                    sources=sources, base_model=None, levels=levels, line=line, whole_models=True
                ),
            )
        items = self.items(keys["slices"], "slices must be a list of entries `- sources: [...]`")
        return tuple(self.slice(item, levels) for item in items)

    def slice(self, node: yaml.Node, levels: tuple[ParameterMap, ...]) -> Slice:
        """Return an entry of `slices`."""
        keys = self.known(node, "a slice", ("sources", "base_model", "parameters"))
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
        keys = self.known(node, name, ("model", "layer_range", "parameters", "stats"), _MISPLACED)
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
            stats=self.string(keys["stats"], "stats") if "stats" in keys else None,
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
        if not isinstance(node, yaml.MappingNode):
            return self.located(self.string(node, key))
        allowed = ("model", "lora", "override_architecture")
        parts = self.mapping(node, key, allowed=allowed)
        if "model" not in parts:
            raise self.fail(node, f"{key} as a mapping must have the key 'model'")
        paths = [self.model_path(parts[n], n) for n in ("model", "lora") if n in parts]
        name = "+".join(paths)
        if "override_architecture" in parts:
            value = self.string(parts["override_architecture"], "override_architecture")
            self.architectures[name] = value
        return name

    def model_path(self, node: yaml.Node, key: str) -> str:
        """Return PATH or PATH@REVISION, also from a mapping with `path` and `revision`."""
        if not isinstance(node, yaml.MappingNode):
            return self.located(self.string(node, key))
        names = ("path", "revision")
        parts = self.mapping(node, key, allowed=names)
        if "path" not in parts:
            raise self.fail(node, f"{key} as a mapping must have the key 'path'")
        return self.located("@".join(self.string(parts[n], n) for n in names if n in parts))

    def located(self, model: str) -> str:
        """Return a model's name, with that of another recipe's result replaced by its folder."""
        name = re.split("[+@]", model, maxsplit=1)[0]
        if name not in self._folders:
            return model
        self.depends[name] = None
        return self._folders[name] + model[len(name) :]

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
        allowed = ("source", "pad_to_multiple_of", "tokens")
        inside = self.known(keys["tokenizer"], "tokenizer", allowed)
        multiple = 1
        if "pad_to_multiple_of" in inside:
            multiple = self.integer(inside["pad_to_multiple_of"], "pad_to_multiple_of")
            if not 1 <= multiple <= MAX_PADDING:
                message = f"pad_to_multiple_of must be from 1 to {MAX_PADDING:,}, not {multiple}"
                raise self.fail(inside["pad_to_multiple_of"], message)
        source = self.model(inside["source"], "source") if "source" in inside else "union"
        tokens = self.entries(inside["tokens"], "tokens") if "tokens" in inside else {}
        return TokenizerChoice(
            source=source,
            line=self.line(inside.get("source", keys["tokenizer"])),
            pad_to_multiple_of=multiple,
            tokens={
                token: self.token_row(node, line, token) for token, (line, node) in tokens.items()
            },
        )

    def token_row(self, node: yaml.Node, line: int, token: str) -> TokenRow:
        """Return an entry of `tokens`."""
        shown = truncated_repr(token)
        keys = self.mapping(node, f"the token {shown}", allowed=("source", "force"))
        if "source" not in keys:
            raise self.fail(
                line, f"the token {shown} needs a source: a model, or {{kind: zero}} for zeros"
            )
        force = self.value(keys["force"]) if "force" in keys else False
        if not isinstance(force, bool):
            message = f"force must be true or false, not {truncated_repr(force)}"
            raise self.fail(keys["force"], message)
        source = keys["source"]
        kind = None
        if isinstance(source, yaml.MappingNode):
            kind = self.entries(source, "source").get("kind")
        if kind is None:
            model = self.model(source, "source")
            return TokenRow(model=model, token=None, force=force, line=line)
        name = self.string(kind[1], "kind")
        if name == "zero":
            self.mapping(source, "source", allowed=("kind",))
            return TokenRow(model=None, token=None, force=force, line=line)
        if name != "model_token":
            message = f"kind must be zero or model_token, not {truncated_repr(name)}"
            raise self.fail(kind[1], message)
        parts = self.mapping(source, "source", allowed=("kind", "model", "token", "token_id"))
        if "model" not in parts or ("token" in parts) == ("token_id" in parts):
            raise self.fail(source, "model_token needs model, and either token or token_id")
        return TokenRow(
            model=self.model(parts["model"], "model"),
            token=self.string(parts["token"], "token")
            if "token" in parts
            else self.integer(parts["token_id"], "token_id"),
            force=force,
            line=line,
        )
