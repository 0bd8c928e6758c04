"""YAML nodes to values, with the file and the line in every error.

Only what a recipe may have is made: text, numbers, true, false, null, lists and mappings.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from yaml.constructor import SafeConstructor

from sdjax.core.errors import UserError, truncated_repr

MOST_VALUES = 100_000  # in a document, aliases followed; a recipe has some hundreds
MOST_LEVELS = 30  # of which a recipe has some eight

_YAML = "tag:yaml.org,2002:"
_MERGE = f"{_YAML}merge"
_SCALARS = {
    f"{_YAML}str": SafeConstructor.construct_yaml_str,
    f"{_YAML}int": SafeConstructor.construct_yaml_int,
    f"{_YAML}float": SafeConstructor.construct_yaml_float,
    f"{_YAML}bool": SafeConstructor.construct_yaml_bool,
    f"{_YAML}null": SafeConstructor.construct_yaml_null,
}


def read_document(path: Path) -> tuple[str, yaml.Node | None]:
    """A file's text and its one YAML document.

    Raises UserError for a file that has none, and for one that aliases make endless or huge.
    """
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
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; a recipe has some eight levels") from None
    if node is not None:
        _measure(Nodes(path), node, {})
    return text, node


def _measure(
    nodes: Nodes, node: yaml.Node, known: dict[yaml.Node, tuple[int, int] | None]
) -> tuple[int, int]:
    """(values, levels) of a node, aliases followed. known: of nodes met; None of those around."""
    if node not in known:
        known[node] = None
        inner = [] if isinstance(node, yaml.ScalarNode) else node.value
        if isinstance(node, yaml.MappingNode):
            inner = [one for pair in node.value for one in pair]
        parts = [_measure(nodes, one, known) for one in inner]
        values = 1 + sum(count for count, _ in parts)
        levels = 1 + max((deep for _, deep in parts), default=0)
        if values > MOST_VALUES or levels > MOST_LEVELS:
            raise nodes.fail(
                node,
                f"nested too deeply or too large; a recipe has at most {MOST_LEVELS} levels and "
                f"{MOST_VALUES:,} values, aliases followed",
            )
        known[node] = values, levels
    found = known[node]
    if found is None:
        raise nodes.fail(node, "an alias stands within what it stands for")
    return found


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
        own: dict[str, tuple[int, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key must be text")
            if key.value in own or (merged and key.tag == _MERGE):
                raise self.fail(
                    key, f"the key {truncated_repr(key.value)} stands here a second time"
                )
            if key.tag == _MERGE:  # `<<: *shared` brings keys, which those written out override
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                own[key.value] = self.line(key), value
        brought = [self.entries(one, "what << brings") for one in reversed(merged)]
        return {key: value for entries in (*brought, own) for key, value in entries.items()}

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
                raise self.fail(
                    line, f"unknown key {truncated_repr(key)}; allowed: {', '.join(allowed)}"
                )
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
            raise self.fail(
                node, f"{key} must be a whole number, 0 or more, not {truncated_repr(value)}"
            )
        return value

    def value(self, node: yaml.Node) -> Any:
        """The node as text, number, true, false, null, list or mapping."""
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_YAML}map":
            return {key: self.value(one) for key, (_, one) in self.entries(node, "").items()}
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_YAML}seq":
            return [self.value(one) for one in node.value]
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            kind = truncated_repr(node.tag.removeprefix(_YAML))
            raise self.fail(
                node, f"{kind} is no value of a recipe: text, number, true, false, list or mapping"
            )
        try:
            value = _SCALARS[node.tag](SafeConstructor(), node)
            repr(value)  # a number may have more digits than Python writes
        except (ValueError, LookupError, OverflowError):
            raise self.fail(
                node, f"no value that can be read: {truncated_repr(node.value)}"
            ) from None
        return value
