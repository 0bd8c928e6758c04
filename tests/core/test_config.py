from typing import ClassVar

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, PositiveInt, dataclass_from, read_dataclass
from sdjax.core.errors import UserError


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Section:
    RENAMED_KEYS: ClassVar[dict[str, str]] = {"clip": "max_grad_norm"}

    max_grad_norm: float = 1.0
    steps: PositiveInt | None = None
    names: str | tuple[str, ...] | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Config:
    section: Section = Field(default_factory=Section)
    sections: dict[str, Section] = Field(default_factory=dict)


def read(tmp_path, text, overrides=()):
    path = tmp_path / "config.yaml"
    path.write_text(text)
    return read_dataclass(Config, path, overrides)


def test_sections_are_read_into_dataclasses(tmp_path):
    config = read(tmp_path, "section: {max_grad_norm: 1e-6, names: [a, 2024-01-31]}")
    assert config.section == Section(max_grad_norm=1e-6, names=("a", "2024-01-31"))
    merged = read(tmp_path, "section: &a {steps: 2}\nsections: {b: {<<: *a, names: x}}")
    assert merged.sections == {"b": Section(steps=2, names="x")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("section:\n  clip: 1", "line 2: section.clip was renamed to max_grad_norm in 0.2"),
        ("sections: {a: {clip: 1}}", "line 1: sections.a.clip was renamed to max_grad_norm"),
        ("section: {stepz: 1}", "section.stepz; did you mean steps"),
        ("section: {names: [1]}", "section.names"),
        ("section: {names: 1}", "section.names: must be a string or a list, not 1"),
        ("section: {steps: 0}", "section.steps: must be at least 1, not 0"),
        ("section: {steps: [1]}", r"section.steps: must be a whole number, not \[1\]"),
        ("sections: {a: 3}", "sections.a: must be a mapping, not 3"),
    ],
)
def test_invalid_keys_and_values_are_named(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read(tmp_path, text)


def test_renamed_keys_are_named_in_overrides_and_stored_configs(tmp_path):
    with pytest.raises(UserError, match=r"--set section\.clip=1: section\.clip was renamed to max"):
        read(tmp_path, "section: {}", ["section.clip=1"])
    with pytest.raises(UserError, match=r"runs/old: section\.clip was renamed"):
        dataclass_from(Config, {"section": {"clip": 1}}, "runs/old")
