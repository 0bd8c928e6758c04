"""From YAML to a dataclass, with errors that name the key, the file and line, and what is allowed.

YAML here is plainer than PyYAML's: a key may not stand twice, and 1e-6 is a number.
"""

import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import yaml
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from sdjax.core.errors import UserError

# Configuration classes are `pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=STRICT)`
# and are the settings themselves: a section of a YAML file is the object that the code uses.
STRICT = ConfigDict(extra="forbid", strict=True)

PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Percent = Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)]
NonEmptyStr = Annotated[str, Field(min_length=1)]

Location = tuple[str | int, ...]

T = TypeVar("T")


class _Loader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(
                    None, None, "a key must be a text", key.start_mark
                )
            if key.value in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key.value!r} stands twice", key.start_mark
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


# YAML 1.1 takes 2024-01-31 for a date; nothing here is one.
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if not tag.endswith(":timestamp")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(  # YAML 1.1 takes 1e-6 for a string
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


# A number such as `0b_` is a ValueError of PyYAML's, nesting without end a RecursionError.
_NOT_YAML = (yaml.YAMLError, ValueError, RecursionError)


def read_dataclass(kind: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Reads a pydantic dataclass from a YAML file and validates it.

    overrides: "generation.samples=64", whose value is read as YAML.
    Raises UserError, one line: file, line or --set, key, what is wrong, what is allowed.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=_Loader)
        data = yaml.load(text, Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from error
    except _NOT_YAML as error:
        raise UserError(f"{path}{_line(error)}: not valid YAML: {_problem(error)}") from error
    if not isinstance(data, dict):
        raise UserError(f"{path}: must be a mapping of keys to values")
    told: dict[Location, str] = {}
    for override in overrides:
        told[_override(data, override)] = f"--set {override}"

    def where(location: Location) -> str:
        for place, name in told.items():  # what was set, or a section in which something was
            depth = min(len(place), len(location))
            if depth and location[:depth] == place[:depth]:
                return name
        if not location and told:
            return f"{path} with {', '.join(told.values())}"
        line = _node_line(node, location)
        return f"{path}:{line}" if line else str(path)

    return _validate(kind, data, where)


def dataclass_from(kind: type[T], data: Mapping[str, Any], where: str) -> T:
    """The dataclass of plain data, such as a store keeps. Raises UserError as `read_dataclass`."""
    return _validate(kind, data, lambda location: where)


def _validate(kind: type[T], data: Mapping[str, Any], where: Callable[[Location], str]) -> T:
    # JSON, because strict validation of Python data would refuse a list where a tuple is meant.
    try:
        text = json.dumps(data, default=str)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where(())}: an alias within itself, or nested too deep") from error
    try:
        return TypeAdapter(kind).validate_json(text)
    except ValidationError as error:
        # Unknown keys first: a misspelt key is also a missing one.
        errors = sorted(error.errors(), key=lambda e: e["type"] != "unexpected_keyword_argument")
        location = _untagged(errors[0]["loc"])
        alike = [one for one in errors if _untagged(one["loc"]) == location]
        line = f"{where(location)}: {_explain(kind, alike, location)}"
        raise UserError(" ".join(line.split())) from error


def _untagged(location: Location) -> Location:
    """Without the parts by which pydantic names the branches of a union."""
    return tuple(
        part
        for part in location
        if not re.match(r"(str|bool|int|float|tuple\[.*|constrained-str)$", str(part))
    )


def _explain(root: type, errors: Sequence[Any], location: Location) -> str:
    key = ".".join(map(str, location))
    error = errors[0]
    match error["type"]:
        case "unexpected_keyword_argument":
            allowed = _keys_at(root, location[:-1])
            near = difflib.get_close_matches(str(location[-1]), allowed, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            return f"unknown key {key}: {hint}allowed here: {', '.join(allowed)}"
        case "missing" | "missing_argument" | "missing_keyword_only_argument":
            return f"the key {key} is missing"
        case "value_error":
            message = str(error["ctx"]["error"])
            return f"{key}: {message}" if key else message
        case "too_short":
            return f"{key}: must not be empty"
    wanted = dict.fromkeys(_wanted(one["msg"]) for one in errors)
    given = json.dumps(error["input"], default=str)
    shown = given if len(given) <= 60 else f"{given[:59]}…"
    return f"{key}: must be {' or '.join(wanted)}, not {shown}"


_PLAIN = {
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid string": "a text",
    "a valid boolean": "true or false",
    "a valid array": "a list",
    "an object": "a mapping",
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
}


def _wanted(message: str) -> str:
    """What pydantic wants, in the words of YAML."""
    wanted = re.sub(r"^.*? should (be|have|match) ", "", message)
    for theirs, ours in _PLAIN.items():
        wanted = wanted.replace(theirs, ours)
    return wanted


def _keys_at(root: type, location: Location) -> list[str]:
    """The keys that the section at a location may have."""
    kind: Any = root
    for part in location:
        if dataclasses.is_dataclass(kind):
            kind = get_type_hints(kind)[str(part)]
        else:  # dict[str, section], perhaps annotated
            arguments = get_args(kind)
            kind = arguments[-1] if arguments else kind
        kind = getattr(kind, "__origin__", kind) if hasattr(kind, "__metadata__") else kind
    return [field.name for field in dataclasses.fields(kind)]


def _override(data: dict, override: str) -> Location:
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise UserError(f"--set {override}: must be key=value, such as generation.samples=64")
    try:
        value = yaml.load(text, Loader=_Loader)
    except _NOT_YAML as error:
        raise UserError(f"--set {override}: not valid YAML: {_problem(error)}") from error
    parts = key.split(".")
    section = data
    for part in parts[:-1]:
        if section.get(part) is None:
            section[part] = {}
        section = section[part]
        if not isinstance(section, dict):
            raise UserError(f"--set {override}: {part} has no keys below it")
    section[parts[-1]] = value
    return tuple(parts)


def _node_line(node: yaml.Node | None, location: Location) -> int | None:
    """The line of a location's key, or of the nearest section around it that the file has."""
    line = None
    for part in location:
        if isinstance(node, yaml.MappingNode):
            found = [(key, value) for key, value in node.value if key.value == part]
            if not found:
                return line
            key, node = found[0]
            line = key.start_mark.line + 1
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            line = node.start_mark.line + 1
        else:
            return line
    return line


def _line(error: Exception) -> str:
    mark = getattr(error, "problem_mark", None)
    return f":{mark.line + 1}" if mark else ""


def _problem(error: Exception) -> str:
    return " ".join(str(getattr(error, "problem", None) or error).split())
