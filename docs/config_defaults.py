"""Griffe extension: document inherited keys and defaults of config classes."""

from __future__ import annotations

import ast
from typing import Any

import griffe
import yaml

_CONFIG_DECORATOR = "pydantic.dataclasses.dataclass"
_FACTORY = "Field(default_factory="


class ConfigDefaults(griffe.Extension):
    """Add inherited keys and all defaults to the attributes of pydantic dataclasses."""

    def on_class(self, *, cls: griffe.Class, **_: Any) -> None:
        """Edit the parsed docstring of a config class."""
        decorators = {decorator.callable_path for decorator in cls.decorators}
        if _CONFIG_DECORATOR not in decorators or cls.docstring is None:
            return
        inherited: dict[str, str] = {}
        for base in reversed(cls.mro()):
            if base.docstring is not None:
                for section in _attribute_sections(base.docstring.parse("google")):
                    inherited |= {key.name: key.description for key in section.value}
        for section in _attribute_sections(cls.docstring.parsed):
            keys = {key.name: key for key in section.value}
            for name, attribute in cls.all_members.items():
                if name not in keys and name in inherited:
                    keys[name] = griffe.DocstringAttribute(
                        name, annotation=attribute.annotation, description=inherited[name]
                    )
                    section.value.append(keys[name])
                if name in keys:
                    keys[name].description += f" {_default(attribute)}"


def _attribute_sections(sections: list[Any]) -> list[Any]:
    return [item for item in sections if item.kind is griffe.DocstringSectionKind.attributes]


def _default(attribute: Any) -> str:
    """Return the default of a key in words, as YAML spells it."""
    value = "" if attribute.value is None else str(attribute.value)
    if not value:
        return "Required."
    if value.startswith(_FACTORY):
        factory = value.removeprefix(_FACTORY).removesuffix(")")
        return "Default: empty." if factory == "dict" else f"Default: that of `{factory}`."
    number, shift, bits = value.partition("<<")
    if shift:
        value = str(int(number) << int(bits))
    return f"Default: `{_as_yaml(value)}`."


def _as_yaml(source: str) -> str:
    """Return a Python literal as YAML on one line; anything else, and numbers, as they are."""
    try:
        value = ast.literal_eval(source)
    except ValueError:
        return source
    if isinstance(value, int | float) and not isinstance(value, bool):
        return source
    text = yaml.safe_dump(value, default_flow_style=True, width=10_000)
    return text.removesuffix("...\n").strip()
