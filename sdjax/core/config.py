"""Config files: YAML validated into frozen dataclasses.

A config class is a `pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)`, and
its instances are the settings themselves: a section of the file is the object that the code uses.
Errors name the file, the line, the key, and what is allowed there.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sdjax.core.errors import UserError
from sdjax.core.yaml import YamlDocument

STRICT = ConfigDict(extra="forbid", strict=True)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Percent = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
NonEmptyStr = Annotated[str, Field(min_length=1)]

Location = tuple[str | int, ...]

T = TypeVar("T")


def read_dataclass(cls: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a config file.

    Args:
        cls: the config class. Its optional `RENAMED_KEYS: ClassVar[dict[str, str]]` maps keys of
            version 0.1 to their new names, for the error message.
        path: a YAML file.
        overrides: assignments such as "generation.samples=64"; the values are YAML.

    Raises:
        UserError: an unreadable file, an unknown or missing key, or an invalid value.
    """
    document = YamlDocument.read(Path(path))
    data = None if document.root is None else document.value(document.root)
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys to values")
    overridden = {_apply_override(data, override): override for override in overrides}

    def where(location: Location) -> str:
        for key, override in overridden.items():
            depth = min(len(key), len(location))
            if depth and location[:depth] == key[:depth]:
                return f"--set {override}"
        if not location and overridden:
            return f"{path} with --set {' --set '.join(overridden.values())}"
        line = document.line_at(location)
        return str(path) if line is None else f"{path}, line {line}"

    return _validate(cls, data, where)


def dataclass_from(cls: type[T], data: Mapping[str, Any], where: str) -> T:
    """Build a config from plain data, such as that of a stored run.

    Args:
        cls: the config class.
        data: JSON-compatible data.
        where: origin of the data in error messages.

    Raises:
        UserError: an unknown or missing key, or an invalid value.
    """
    return _validate(cls, data, lambda location: where)


def _validate(cls: type[T], data: Mapping[str, Any], where: Callable[[Location], str]) -> T:
    # From JSON, since strict validation of Python data rejects a list for a tuple.
    text = json.dumps(data)
    try:
        return TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        found = [(_resolve(cls, item["loc"]), item) for item in error.errors()]
    # Unknown keys first: a misspelled key usually leaves another one missing.
    found.sort(key=lambda pair: pair[1]["type"] != "unexpected_keyword_argument")
    location, section = found[0][0]
    errors = [item for (other, _), item in found if other == location]
    message = f"{where(location)}: {_explain(errors, location, section)}"
    raise UserError(" ".join(message.split()))


def _resolve(cls: Any, raw: Location) -> tuple[Location, Any]:
    """Return (location, class of the innermost section) for a pydantic error location.

    Pydantic inserts the name of the branch after each union; the annotations determine where.
    """
    location: list[str | int] = []
    section = annotation = cls
    for part in raw:
        if len(branches := _branches(annotation)) > 1:
            containers = [branch for branch in branches if get_args(branch)]
            annotation = (containers or branches)[0]
            continue
        annotation = branches[0]
        location.append(part)
        if dataclasses.is_dataclass(annotation):
            section = annotation
            annotation = get_type_hints(section, include_extras=True).get(str(part), Any)
        else:
            inner = [inner for inner in get_args(annotation) if inner is not Ellipsis]
            annotation = inner[-1] if inner else Any
    return tuple(location), section


def _branches(annotation: Any) -> list[Any]:
    """Return the members of a union except None, or a one-item list for any other annotation."""
    while get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) not in (Union, types.UnionType):
        return [annotation]
    inner = [branch for item in get_args(annotation) for branch in _branches(item)]
    return [branch for branch in inner if branch is not type(None)]


# What a value must be, keyed by pydantic's error type.
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "a string",
    "bool_type": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a mapping",
    "dataclass_type": "a mapping",
    "literal_error": "{expected}",
    "greater_than": "greater than {gt}",
    "greater_than_equal": "at least {ge}",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
}


def _explain(errors: Sequence[Any], location: Location, section: Any) -> str:
    """Return a description of the errors at one location; a union has one error per branch."""
    key = ".".join(map(str, location))
    error = errors[0]
    match error["type"]:
        case "unexpected_keyword_argument":
            return _unknown_key(key, str(location[-1]), section)
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"the key {key} is missing"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{key}: {message}" if key else message
        case "too_short" | "string_too_short":
            return f"{key}: must not be empty"
    expected = dict.fromkeys(
        _EXPECTED[item["type"]].format(**item.get("ctx", {}))
        for item in errors
        if item["type"] in _EXPECTED
    )
    if not expected:
        return f"{key}: {error['msg']}"
    value = json.dumps(error["input"], default=str)
    value = value if len(value) <= 60 else f"{value[:59]}…"
    return f"{key}: must be {' or '.join(expected)}, not {value}"


def _unknown_key(key: str, name: str, section: Any) -> str:
    renamed = getattr(section, "RENAMED_KEYS", {})
    if name in renamed:
        return f"{key} was renamed to {renamed[name]} in 0.2"
    allowed = [field.name for field in dataclasses.fields(section)]
    similar = difflib.get_close_matches(name, allowed, 1)
    hint = f"did you mean {similar[0]}? " if similar else ""
    return f"unknown key {key}; {hint}allowed: {', '.join(allowed)}"


def _apply_override(data: dict[str, Any], override: str) -> Location:
    """Assign the value of "key.subkey=value" in `data`; return the key as a location."""
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: must be key=value, such as generation.samples=64")
    document = YamlDocument(text, f"--set {override}", show_lines=False)
    *parents, name = key.split(".")
    section = data
    for part in parents:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise UserError(f"--set {override}: {part} has no subkeys")
    section[name] = None if document.root is None else document.value(document.root)
    return (*parents, name)
