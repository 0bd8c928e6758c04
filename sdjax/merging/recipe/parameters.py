"""Parameters of a recipe: single values, gradients over layers, and values filtered by tensor.

The rules are mergekit's. A list of values is a gradient: numbers are interpolated along the layers
of a slice; booleans and strings switch from one to the next. A list of entries with `value` and
`filter` is searched from the top: the first entry without a filter, or whose filter is part of the
tensor's name, applies. Parameters may be set for a model, a slice, a module and the whole recipe;
the innermost level that has a value for the tensor wins.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sdjax.core.errors import UserError, truncated_repr
from sdjax.merging.schedule import interpolate

FUSE_EXPERTS = "fuse_experts"
# Parameters that every method has. `int8_mask` saves memory in mergekit; no masks are stored here.
RECIPE_PARAMETERS = ("int8_mask", FUSE_EXPERTS)
_MAX_FLOAT32 = 3.4e38  # methods compute in float32
_NO_MATCH = object()
_TYPE_NAMES = {
    "float": "a number",
    "unit_interval": "a number from 0 to 1",
    "bool": "true or false",
    "int": "an integer, 0 or more",
    "str": "a string",
}


@dataclass(frozen=True, kw_only=True)
class ParameterValue:
    """The value of a parameter as written in a recipe.

    Attributes:
        key: the parameter.
        value: a value, a gradient or a list of filtered values.
        line: the line of the key.
        path: the recipe.
    """

    key: str
    value: Any
    line: int
    path: str

    def fail(self, message: str) -> UserError:
        """Return the error, with the file and the line."""
        return UserError(f"{self.path}, line {self.line}: {self.key}: {message}")


ParameterMap = Mapping[str, ParameterValue]


@dataclass(frozen=True, kw_only=True)
class ParameterType:
    """The type of a parameter.

    Attributes:
        key: its key in a recipe.
        name: "float", "unit_interval" (a float in [0, 1]), "bool", "int" or "str".
        choices: for "str", the values that a recipe may have and what they mean; if empty, any
            string is allowed.
    """

    key: str
    name: str
    choices: Mapping[Any, str]


def resolve(
    levels: Sequence[ParameterMap], parameter: ParameterType, tensor: str, position: float
) -> Any:
    """Return the value of a parameter for one tensor, or None if no level has one.

    Args:
        levels: the parameters of all levels, the innermost first.
        parameter: the parameter.
        tensor: the tensor's name in the checkpoint, for filters.
        position: position of its layer within the slice, in [0, 1], for gradients.

    Raises:
        UserError: a value has the wrong type; the message contains the line.
    """
    for level in levels:
        if parameter.key not in level:
            continue
        entry = level[parameter.key]
        value = entry.value
        while isinstance(value, list | Mapping):
            items = [value] if isinstance(value, Mapping) else value
            if items and not any(isinstance(item, Mapping) for item in items):
                return _interpolate(entry, parameter, items, position)
            value = _first_match(entry, items, tensor)
            if value is _NO_MATCH:
                break
        else:
            return _checked(entry, parameter, value)
    return None


def _first_match(entry: ParameterValue, items: Sequence[Any], tensor: str) -> Any:
    """Return the value of the first item whose filter matches the tensor, or _NO_MATCH."""
    for item in items:
        keys = set(item) if isinstance(item, Mapping) else {"value"}
        if unknown := sorted(keys - {"value", "filter"}):
            raise entry.fail(f"unknown key {truncated_repr(unknown[0])}; allowed: value, filter")
        if not isinstance(item, Mapping) or "value" not in item:
            raise entry.fail("every entry of a list with filters must have the key 'value'")
        pattern = item.get("filter")
        if pattern in (None, "*") or str(pattern) in tensor:
            return item["value"]
    return _NO_MATCH


def _interpolate(
    entry: ParameterValue, parameter: ParameterType, items: Sequence[Any], position: float
) -> Any:
    values = [_checked(entry, parameter, item) for item in items]
    if parameter.name in ("bool", "str"):
        return values[int(position * (len(values) - 1))]
    return _checked(entry, parameter, interpolate(values, position))


def _checked(entry: ParameterValue, parameter: ParameterType, value: Any) -> Any:
    name, choices = parameter.name, parameter.choices
    if name == "str" and not isinstance(value, list | Mapping) and value in choices:
        return choices[value]
    if name == "str" and choices:
        allowed = ", ".join(_as_yaml(choice) for choice in choices)
        raise entry.fail(f"expected one of {allowed}, found {_as_yaml(value)}")
    if name == "str" and isinstance(value, str):
        return value
    if name == "bool" and (isinstance(value, bool) or value in (0, 1)):
        return bool(value)
    number = value
    if isinstance(value, str):  # a quoted number
        try:
            number = float(value)
        except ValueError:
            number = None
    if isinstance(number, int | float) and not isinstance(number, bool):
        if name == "float" and abs(number) <= _MAX_FLOAT32:
            return float(number)
        if name == "unit_interval" and 0 <= number <= 1:
            return float(number)
        if name == "int" and 0 <= number <= _MAX_FLOAT32 and float(number).is_integer():
            return int(number)
    raise entry.fail(f"expected {_TYPE_NAMES[name]}, found {_as_yaml(value)}")


def _as_yaml(value: Any) -> str:
    if value is None:
        return "nothing"
    return str(value).lower() if isinstance(value, bool) else truncated_repr(value)
