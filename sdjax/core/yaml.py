"""YAML documents with line numbers, for run configs, training configs and recipes.

The dialect is a safe subset: strings, numbers, booleans, null, lists and mappings, with merge keys
(`<<`). Unlike PyYAML's, it rejects duplicate keys and recursive aliases, reads 1e-6 as a number and
reads dates and times such as 12:30 as strings (YAML 1.2), which PyYAML reads as numbers in base 60.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import yaml
from yaml.constructor import SafeConstructor

from sdjax.core.errors import UserError, did_you_mean, truncated_repr
from sdjax.core.files import read_text

MAX_CHARACTERS = 1_000_000  # per document; parsing takes a few seconds for so many
MAX_VALUES = 100_000  # per document, with aliases expanded
MAX_LEVELS = 30

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"
_NULL = f"{_TAG}null"
_MAX_DIGITS = 1_000  # of a number


def _number(construct: Callable[..., Any]) -> Callable[..., Any]:
    """Return PyYAML's function for numbers without those in base 60, whose time is quadratic."""

    def checked(constructor: SafeConstructor, node: yaml.ScalarNode) -> Any:
        if ":" in node.value or len(node.value) > _MAX_DIGITS:
            raise ValueError(node.value[:60])
        return construct(constructor, node)

    return checked


_SCALARS = {
    f"{_TAG}str": SafeConstructor.construct_yaml_str,
    f"{_TAG}int": _number(SafeConstructor.construct_yaml_int),
    f"{_TAG}float": _number(SafeConstructor.construct_yaml_float),
    f"{_TAG}bool": SafeConstructor.construct_yaml_bool,
    _NULL: SafeConstructor.construct_yaml_null,
}


class _TooLargeError(yaml.YAMLError):
    """A document has more values than allowed."""


class _Loader(yaml.SafeLoader):
    """Loader that reads dates and times as strings, and 1e-6 as a number, up to `MAX_VALUES`."""

    _values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._values += 1
        if self._values > MAX_VALUES:
            raise _TooLargeError
        return super().compose_node(parent, index)


_REPLACED = (f"{_TAG}timestamp", f"{_TAG}int", f"{_TAG}float")
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    f"{_TAG}int",
    re.compile(r"^[-+]?(?:0b[0-1_]+|0[0-7_]+|0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    f"{_TAG}float",
    re.compile(
        r"^(?:[-+]?[0-9][0-9_]*(?:\.[0-9_]*)?[eE][-+]?[0-9]+|[-+]?[0-9][0-9_]*\.[0-9_]*"
        r"|\.[0-9][0-9_]*(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)


class YamlDocument:
    """A parsed YAML document whose errors name the file and the line.

    Attributes:
        name: name of the document in error messages, usually a path.
        text: the unparsed text.
        root: the top node, or None if the document is empty.
    """

    def __init__(self, text: str, name: str, *, show_lines: bool = True) -> None:
        """Parse a document.

        Args:
            text: the YAML text.
            name: name of the document in error messages.
            show_lines: whether error messages contain line numbers.

        Raises:
            UserError: not valid YAML, several documents, a recursive alias, or too large.
        """
        self.name, self.text = name, text
        self._show_lines = show_lines
        if len(text) > MAX_CHARACTERS:
            raise self.fail(None, f"too large; at most {MAX_CHARACTERS:,} characters")
        try:
            self.root: yaml.Node | None = yaml.compose(text, Loader=_Loader)
        except _TooLargeError:
            raise self.fail(None, f"too large; at most {MAX_VALUES:,} values") from None
        except yaml.YAMLError as error:
            mark = getattr(error, "problem_mark", None)
            problem = getattr(error, "problem", None) or str(error)
            if problem.startswith("but "):
                problem = f"{getattr(error, 'context', '')}, {problem}"
            message = " ".join(f"not valid YAML: {problem}".split())
            raise self.fail(mark and mark.line + 1, message) from error
        except RecursionError:
            raise self.fail(None, "nested too deeply") from None
        except ValueError as error:  # an escape such as \\U00110000 that is not a character
            raise self.fail(None, f"not valid YAML: {error}") from None
        if self.root is not None:
            self._check_size(self.root, {})

    @classmethod
    def read(cls, path: Path) -> Self:
        """Read a file. Raises UserError if it cannot be read or parsed."""
        return cls(read_text(path, 4 * MAX_CHARACTERS), str(path))

    def line(self, node: yaml.Node) -> int:
        """Return the line, from 1, on which a node starts."""
        return node.start_mark.line + 1

    def line_at(self, location: Sequence[str | int]) -> int | None:
        """Return the line of a key or list item, or of the closest enclosing one that exists."""
        line, node = None, self.root
        for part in location:
            if isinstance(node, yaml.MappingNode):
                entries = self.entries(node, "")
                if part not in entries:
                    return line
                line, node = entries[str(part)]
            elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
                node = node.value[part]
                line = self.line(node)
            else:
                return line
        return line

    def fail(self, at: yaml.Node | int | None, message: str) -> UserError:
        """Return the error for a node, a line number or, with None, the whole document."""
        line = at if isinstance(at, int) or at is None else self.line(at)
        if line is None or not self._show_lines:
            return UserError(f"{self.name}: {message}")
        return UserError(f"{self.name}, line {line}: {message}")

    def entries(self, node: yaml.Node | None, name: str) -> dict[str, tuple[int, yaml.Node]]:
        """Return a dict from key to (line of the key, value node), with merge keys resolved.

        Args:
            node: a mapping node; anything else raises UserError.
            name: name of the node in error messages.
        """
        if not isinstance(node, yaml.MappingNode):
            raise self.fail(node, f"{name} must be a mapping of keys to values")
        own: dict[str, tuple[int, yaml.Node]] = {}
        merged: list[yaml.Node] = []
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise self.fail(key, "a key must be a string")
            if key.value in own or (merged and key.tag == _MERGE):
                self.check_duplicate(key, value)
            if key.tag == _MERGE:  # explicit keys override those of `<<: *shared`
                merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            else:
                own[key.value] = self.line(key), value
        defaults = [self.entries(item, "the value of <<") for item in reversed(merged)]
        return {key: value for entries in (*defaults, own) for key, value in entries.items()}

    def check_duplicate(self, key: yaml.ScalarNode, value: yaml.Node) -> None:
        """Raise UserError for a key that a mapping has twice; a subclass may accept the last one.

        Args:
            key: the second key.
            value: its value.
        """
        raise self.fail(key, f"duplicate key {truncated_repr(key.value)}")

    def mapping(
        self,
        node: yaml.Node | None,
        name: str,
        *,
        allowed: Sequence[str],
        unsupported: Sequence[str] = (),
    ) -> dict[str, yaml.Node]:
        """Return a dict from key to value node, without keys whose value is null.

        Args:
            node: a mapping node; anything else raises UserError.
            name: name of the node in error messages.
            allowed: the keys that it may have.
            unsupported: keys that are valid in principle but not supported yet.
        """
        entries = self.entries(node, name)
        for key, (line, _) in entries.items():
            if key in unsupported:
                raise self.fail(line, f"{key!r} is not supported yet")
            if key not in allowed:
                hint = did_you_mean(key, allowed, f"allowed: {', '.join(allowed)}")
                raise self.fail(line, f"unknown key {truncated_repr(key)}; {hint}")
        return {key: value for key, (_, value) in entries.items() if value.tag != _NULL}

    def items(self, node: yaml.Node, message: str) -> list[yaml.Node]:
        """Return the items of a non-empty list; anything else raises UserError(message)."""
        if not isinstance(node, yaml.SequenceNode) or not node.value:
            raise self.fail(node, message)
        return list(node.value)

    def string(self, node: yaml.Node, key: str) -> str:
        """Return the text of a non-empty scalar."""
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise self.fail(node, f"{key} must be a string")
        return str(node.value)

    def integer(self, node: yaml.Node, key: str) -> int:
        """Return an integer that is 0 or more."""
        value = self.value(node)
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            raise self.fail(
                node, f"{key} must be a whole number, 0 or more, not {truncated_repr(value)}"
            )
        return value

    def value(self, node: yaml.Node) -> Any:
        """Convert a node to a string, number, boolean, None, list or dict."""
        if isinstance(node, yaml.MappingNode) and node.tag == f"{_TAG}map":
            return {key: self.value(item) for key, (_, item) in self.entries(node, "").items()}
        if isinstance(node, yaml.SequenceNode) and node.tag == f"{_TAG}seq":
            return [self.value(item) for item in node.value]
        if not isinstance(node, yaml.ScalarNode) or node.tag not in _SCALARS:
            tag = truncated_repr(node.tag.removeprefix(_TAG))
            raise self.fail(
                node,
                f"values of type {tag} are not supported; use a string, number, true, false, list "
                "or mapping",
            )
        try:
            value = _SCALARS[node.tag](SafeConstructor(), node)
            repr(value)  # fails if an integer has more digits than Python prints
        except (ValueError, LookupError, OverflowError):
            raise self.fail(node, f"invalid value {truncated_repr(node.value)}") from None
        return value

    def _check_size(
        self, node: yaml.Node, sizes: dict[yaml.Node, tuple[int, int] | None], key: str = ""
    ) -> tuple[int, int]:
        """Return (values, levels) of a node with aliases expanded; raise UserError if too large.

        `sizes` caches the visited nodes; None marks those that enclose the current one. `key` is
        that of the node, for messages.
        """
        if node not in sizes:
            sizes[node] = None
            if isinstance(node, yaml.ScalarNode):
                self._check_text(node, key)
                children = []
            elif isinstance(node, yaml.MappingNode):
                children = [(name, "") for name, _ in node.value]
                children += [(value, str(name.value)[:60]) for name, value in node.value]
            else:
                children = [(item, key) for item in node.value]
            inner = [self._check_size(child, sizes, name) for child, name in children]
            values = 1 + sum(count for count, _ in inner)
            levels = 1 + max((depth for _, depth in inner), default=0)
            if values > MAX_VALUES or levels > MAX_LEVELS:
                raise self.fail(
                    node,
                    f"nested too deeply or too large; at most {MAX_LEVELS} levels and "
                    f"{MAX_VALUES:,} values, with aliases expanded",
                )
            sizes[node] = values, levels
        size = sizes[node]
        if size is None:
            raise self.fail(node, "recursive alias")
        return size

    def _check_text(self, node: yaml.ScalarNode, key: str) -> None:
        """Raise UserError for half of a surrogate pair, which cannot be written or printed."""
        if any("\ud800" <= character <= "\udfff" for character in node.value):
            subject = f"{key}: " if key else ""
            shown = truncated_repr(node.value)
            raise self.fail(node, f"{subject}{shown} contains half of a surrogate pair")
