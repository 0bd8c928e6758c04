"""Config files: YAML validated into frozen dataclasses.

A config class is a `pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)`, and
its instances are the settings themselves: a section of the file is the object that the code uses.
Errors name the file, the line, the key, and what is allowed there; `errors_at` does the same for
values that only later code can check.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import json
import os
import re
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sdjax.core.errors import UserError, closest_name, did_you_mean
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


class ConfigOrigin:
    """Places of a config's values: lines of a file, and options of the command line."""

    def __init__(
        self, name: str, file: Path | None = None, document: YamlDocument | None = None
    ) -> None:
        """Create the origin.

        Args:
            name: name of the file or of the stored run, for error messages.
            file: the file, if there is one.
            document: the parsed file, for line numbers.
        """
        self.name = name
        self.file = file
        self._document = document
        self._options: dict[Location, str] = {}

    def add_option(self, location: Location, option: str) -> None:
        """Note that an option, such as "--set iterations=5", sets a key."""
        self._options[location] = option

    def option(self, location: Location) -> str | None:
        """Return the option that sets a key, or a part or section of it; None if there is none."""
        for key, option in self._options.items():
            depth = min(len(key), len(location))
            if depth and location[:depth] == key[:depth]:
                return option
        return None

    def line(self, location: Location) -> int:
        """Return the line of a key in the file; 0 if there is none or an option sets the key."""
        if self._document is None or self.option(location) is not None:
            return 0
        return self._document.line_at(location) or 0

    def place(self, location: Location) -> tuple[str, str]:
        """Return the file or the options that set a key, and its line such as "line 3", or ""."""
        option = self.option(location)
        if option is not None:
            return option, ""
        if not location and self._options:
            return f"{self.name} with {' '.join(self._options.values())}", ""
        line = self.line(location)
        return self.name, f"line {line}" if line else ""

    def where(self, location: Location) -> str:
        """Return the place of a key in one string, such as "run.yaml, line 3"."""
        return ", ".join(filter(None, self.place(location)))


def read_dataclass(
    cls: type[T],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    options: Mapping[str, str] | None = None,
) -> T:
    """Read a config file.

    Args:
        cls: the config class. Its optional `RENAMED_KEYS: ClassVar[dict[str, str]]` maps keys of
            version 0.1 to their new names, for the error message.
        path: a YAML file.
        overrides: assignments such as "generation.samples=64"; the values are YAML.
        options: top-level keys that options of the same name set, such as out by --out.

    Raises:
        UserError: an unreadable file, an unknown or missing key, or an invalid value.
    """
    document = YamlDocument.read(Path(path))
    data = None if document.root is None else document.value(document.root)
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys to values")
    origin = ConfigOrigin(str(path), Path(path), document)
    for override in overrides:
        origin.add_option(_apply_override(data, override), f"--set {override}")
    for key, value in (options or {}).items():
        data[key] = value
        origin.add_option((key,), f"--{key} {value}")
    return _validate(cls, data, origin)


def dataclass_from(
    cls: type[T], data: Mapping[str, Any], where: str, overrides: Sequence[str] = ()
) -> T:
    """Build a config from plain data, such as that of a stored run.

    Args:
        cls: the config class.
        data: JSON-compatible data.
        where: origin of the data in error messages.
        overrides: assignments as in `read_dataclass`.

    Raises:
        UserError: an unknown or missing key, or an invalid value.
    """
    origin, values = ConfigOrigin(where), copy.deepcopy(dict(data))
    for override in overrides:
        origin.add_option(_apply_override(values, override), f"--set {override}")
    return _validate(cls, values, origin)


@contextlib.contextmanager
def errors_at(config: object, key: str) -> Iterator[None]:
    """Start the user errors of a block with the file, line and name of the key that caused them.

    For values that only later code can check, such as the name of a model:

        with errors_at(config, "experts.expert_1.model"):
            folder = model_folder(config.experts["expert_1"].model)

    Args:
        config: a config from `read_dataclass` or `dataclass_from`; the errors of any other config
            name only the key.
        key: the key, with dots between the levels.
    """
    try:
        yield
    except UserError as error:
        origin = getattr(config, _ORIGIN, None)
        where = "" if origin is None else f"{origin.where(_location(key))}: "
        message = str(error).removeprefix(f"{key}: ")
        error.args = (f"{where}{key}: {message}",)
        raise


def replace_keys(config: T, **changes: Any) -> T:
    """Return a copy of a config with other values, whose errors still name its file.

    Args:
        config: a config from `read_dataclass` or `dataclass_from`.
        **changes: new values of its fields.
    """
    changed = dataclasses.replace(config, **changes)  # type: ignore[type-var]
    if hasattr(config, _ORIGIN):
        object.__setattr__(changed, _ORIGIN, getattr(config, _ORIGIN))
    return changed


def path_of(config: object, key: str, value: str) -> Path:
    """Return the path that a key names: relative to the config's file, or to the working directory.

    The path next to the config's file is returned if it exists and no option set the key.

    Args:
        config: a config from `read_dataclass`; for any other, the path is returned as it is.
        key: the key, with dots between the levels.
        value: its value.
    """
    origin = getattr(config, _ORIGIN, None)
    if origin is not None and origin.file is not None and origin.option(_location(key)) is None:
        path = origin.file.parent / value
        if os.path.exists(path):  # os.path, since pathlib raises on invalid names
            return path
    return Path(value)


# Attribute of a config that holds its `ConfigOrigin`. Not a field: equal configs may come from
# different files, and a copy by `dataclasses.replace` comes from none.
_ORIGIN = "_origin"


def _location(key: str) -> Location:
    return tuple(int(part) if part.isdecimal() else part for part in key.split("."))


def _validate(cls: type[T], data: Mapping[str, Any], origin: ConfigOrigin) -> T:
    # From JSON, since strict validation of Python data rejects a list for a tuple.
    text = json.dumps(data)
    try:
        config = TypeAdapter(cls).validate_json(text)
    except ValidationError as error:
        found = [(_resolve(cls, item["loc"]), item) for item in error.errors()]
    else:
        object.__setattr__(config, _ORIGIN, origin)
        return config
    unknown = [place for place, item in found if item["type"] == "unexpected_keyword_argument"]
    renamed = [place for place in unknown if place[0][-1] in _renamed_keys(place[1])]
    if renamed:
        raise UserError(_explain_renamed(renamed, origin))
    # Unknown keys first: a misspelled key usually leaves another one missing.
    found.sort(key=lambda pair: pair[1]["type"] != "unexpected_keyword_argument")
    location, section = found[0][0]
    errors = [item for (other, _), item in found if other == location]
    message = f"{origin.where(location)}: {_explain(errors, location, section)}"
    raise UserError(" ".join(message.split()))


def _renamed_keys(section: Any) -> dict[str, str]:
    return getattr(section, "RENAMED_KEYS", {})


def _explain_renamed(renamed: Sequence[tuple[Location, Any]], origin: ConfigOrigin) -> str:
    """Return a description of all renamed keys, which names each file only once."""
    parts, last_name = [], None
    for location, section in sorted(renamed, key=lambda place: origin.line(place[0])):
        name, line = origin.place(location)
        where = ", ".join(filter(None, (None if name == last_name else name, line)))
        key = ".".join(map(str, location))
        change = f"{key} was renamed to {_renamed_keys(section)[str(location[-1])]} in 0.2"
        parts.append(f"{where}: {change}" if where else change)
        last_name = name
    return "; ".join(parts)


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
    message = f"{key}: must be {' or '.join(expected)}, not {value}"
    choices = re.findall(r"'(\w+)'", " ".join(expected))
    similar = closest_name(str(error["input"]), choices)
    return message if similar is None else f"{message}; did you mean {similar}?"


def _unknown_key(key: str, name: str, section: Any) -> str:
    allowed = [field.name for field in dataclasses.fields(section)]
    hint = did_you_mean(name, allowed, f"allowed: {', '.join(allowed)}")
    return f"unknown key {key}; {hint}"


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
