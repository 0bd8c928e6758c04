"""Values of a recipe's parameters: one value, a gradient over layers, or filters by tensor.

mergekit's rules. A list of values is a gradient: numbers are interpolated along the layers of a
slice, true and false and words change from one to the next. A list of ``{value: ..., filter: ...}``
is read from the top: the first entry counts whose filter is part of the tensor's name, or that has
none. Levels are asked from the model's up to the recipe's, and a level whose filters all miss
passes the question on.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdjax.core.errors import UserError, truncated_repr

_LARGEST = 3.4e38  # in float32, which methods compute in
_WORDS = {
    "float": "number",
    "share": "number from 0 to 1",
    "bool": "true or false",
    "int": "whole number, 0 or more",
    "str": "text",
}


@dataclass(frozen=True, kw_only=True)
class ParameterValue:
    """What a recipe says of one parameter, and on which line of which file."""

    key: str
    value: Any
    line: int
    path: str

    def at(self, tensor: str, place: float, kind: str, choices: Mapping[Any, str]) -> Any:
        """The value for one tensor, or None where no filter matches.

        tensor: its name in the checkpoint. place: of its layer within the slice, in [0, 1]. kind:
        "float", "share" (a float in [0, 1]), "bool", "int" or "str". spellings: for "str", what it
        may be and what that means; without any, it is any text.
        Raises UserError, with the line, for a value of another kind.
        """
        return self._at(self.value, tensor, place, kind, choices)

    def _at(
        self, value: Any, tensor: str, place: float, kind: str, choices: Mapping[Any, str]
    ) -> Any:
        if isinstance(value, Mapping):
            value = [value]
        if not isinstance(value, list):
            return self._checked(value, kind, choices)
        if not value:
            return None
        if any(isinstance(entry, Mapping) for entry in value):
            return self._filtered(value, tensor, place, kind, choices)
        ends = [self._checked(entry, kind, choices) for entry in value]
        scaled = place * (len(ends) - 1)
        first = int(scaled)
        if kind in ("bool", "str"):
            return ends[first]
        second = min(len(ends) - 1, first + 1)
        between = (1 - (scaled - first)) * ends[first] + (scaled - first) * ends[second]
        return self._checked(between, kind, choices)

    def _filtered(
        self, entries: list, tensor: str, place: float, kind: str, choices: Mapping[Any, str]
    ) -> Any:
        for entry in entries:
            keys = set(entry) if isinstance(entry, Mapping) else {"value"}
            if unknown := sorted(keys - {"value", "filter"}):
                raise self.fail(f"unknown key {truncated_repr(unknown[0])}; allowed: value, filter")
            if not isinstance(entry, Mapping) or "value" not in entry:
                raise self.fail("a list of values with filters has `value` in every entry")
            wanted = entry.get("filter")
            if wanted in (None, "*") or str(wanted) in tensor:
                return self._at(entry["value"], tensor, place, kind, choices)
        return None

    def _checked(self, value: Any, kind: str, choices: Mapping[Any, str]) -> Any:
        if kind == "str" and not isinstance(value, list | Mapping) and value in choices:
            return choices[value]
        if kind == "str" and choices:
            allowed = ", ".join(_written(word) for word in choices)
            raise self.fail(f"expected one of {allowed}, found {_written(value)}")
        if kind == "str" and isinstance(value, str):
            return value
        if kind == "bool" and (isinstance(value, bool) or value in (0, 1)):
            return bool(value)
        number = value
        if isinstance(value, str):  # YAML takes 1e-5 for a word
            try:
                number = float(value)
            except ValueError:
                number = None
        if isinstance(number, int | float) and not isinstance(number, bool):
            if kind == "float" and abs(number) <= _LARGEST:
                return float(number)
            if kind == "share" and 0 <= number <= 1:
                return float(number)
            if kind == "int" and 0 <= number <= _LARGEST and float(number).is_integer():
                return int(number)
        raise self.fail(f"expected {_WORDS[kind]}, found {_written(value)}")

    def fail(self, message: str) -> UserError:
        return UserError(f"{self.path}, line {self.line}: {self.key}: {message}")


def _written(value: Any) -> str:
    """As YAML writes it."""
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else truncated_repr(value)


ParameterMap = Mapping[str, ParameterValue]


def find(
    levels: Sequence[ParameterMap],
    key: str,
    tensor: str,
    place: float,
    kind: str,
    choices: Mapping[Any, str],
) -> Any:
    """The value of ``key`` at the first level that has one for this tensor, or None."""
    for level in levels:
        if key in level:
            value = level[key].at(tensor, place, kind, choices)
            if value is not None:
                return value
    return None
