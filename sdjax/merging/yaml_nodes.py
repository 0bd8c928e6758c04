"""YAML nodes to values, with the file and the line in every error."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from sdjax.errors import UserError


def read_document(path: Path) -> tuple[str, yaml.Node | None]:
    """A file's text and its one YAML document. Raises UserError for a file that has none."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the recipe {path}: {error}") from error
    try:
        return text, yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line}: no single YAML document: {problem}") from error
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; a recipe has some five levels") from None


class Nodes:
    """Reads the nodes of one file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def line(self, node: yaml.Node) -> int:
        return node.start_mark.line + 1

    def fail(self, node: yaml.Node | int | None, message: str) -> UserError:
        """The error; ``node`` may be the number of a line."""
        line = node if isinstance(node, int) or node is None else self.line(node)
        where = str(self.path) if line is None else f"{self.path}, line {line}"
        return UserError(f"{where}: {message}")

    def entries(self, node: yaml.Node | None, what: str) -> dict[str, tuple[int, yaml.Node]]:
        """Key to (line of the key, value node)."""
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{what} must be a mapping of keys to values")
        own: set[str] = set()
        for key_node, _ in node.value:
            if key_node.value in own:
                raise self.fail(key_node, f"the key {key_node.value!r} stands here a second time")
            own.add(str(key_node.value))
        try:
            # `<<: *shared` brings keys of its own, which those that are written out override.
            SafeConstructor().flatten_mapping(node)
        except yaml.MarkedYAMLError as error:
            raise self.fail(node, str(error.problem)) from None
        return {str(key.value): (self.line(key), value) for key, value in node.value}

    def mapping(
        self,
        node: yaml.Node | None,
        what: str,
        *,
        allowed: Sequence[str],
        later: Sequence[str] = (),
    ) -> dict[str, yaml.Node]:
        """Key to value node; ``later`` are keys that exist and are not supported yet.

        A key whose value is null counts as absent.
        """
        entries = self.entries(node, what)
        for key, (line, _) in entries.items():
            if key in later:
                raise self.fail(line, f"{key!r} is not supported yet")
            if key not in allowed:
                raise self.fail(line, f"unknown key {key!r}; allowed: {', '.join(allowed)}")
        return {
            key: value
            for key, (_, value) in entries.items()
            if value.tag != "tag:yaml.org,2002:null"
        }

    def items(self, node: yaml.Node, message: str) -> list[yaml.Node]:
        """The entries of a list that is not empty."""
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fail(node, message)
        return list(node.value)

    def text(self, node: yaml.Node, key: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise self.fail(node, f"{key} must be text")
        return str(node.value)

    def number(self, node: yaml.Node, key: str) -> int:
        """A whole number, zero or more."""
        value = self.value(node)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(node, f"{key} must be a whole number, 0 or more, not {value!r}")
        return value

    def choice(self, node: yaml.Node, key: str, allowed: Sequence[str]) -> str:
        value = self.text(node, key)
        if value not in allowed:
            raise self.fail(node, f"{key} must be one of {', '.join(allowed)}, not {value!r}")
        return value

    def value(self, node: yaml.Node) -> Any:
        """The node as YAML's own loader has it."""
        try:
            return yaml.safe_load(yaml.serialize(node))
        except (ValueError, OverflowError) as error:
            raise self.fail(node, f"no value that can be read: {error}") from None
