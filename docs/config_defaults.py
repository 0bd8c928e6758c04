"""Griffe extension: document inherited keys and defaults of config classes."""

from __future__ import annotations

from typing import Any

import griffe

_CONFIG_DECORATOR = "pydantic.dataclasses.dataclass"
_FACTORY = "Field(default_factory="
_YAML = {"None": "null", "True": "true", "False": "false", "()": "[]", "''": '""'}


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
    return f"Default: `{_YAML.get(value, value)}`."
