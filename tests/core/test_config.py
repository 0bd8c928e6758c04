from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, PositiveInt, dataclass_from, errors_at, read_dataclass
from sdjax.core.config_files import CONFIG_FOLDER, find_config
from sdjax.core.errors import TransientError, UserError, closest_name, did_you_mean


@dataclass(frozen=True, kw_only=True, config=STRICT)
class Section:
    RENAMED_KEYS: ClassVar[dict[str, str]] = {"clip": "max_grad_norm", "names_": "names"}

    max_grad_norm: float = 1.0
    steps: PositiveInt | None = None
    names: str | tuple[str, ...] | None = None
    dtype: Literal["float32", "bfloat16"] = "float32"


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
        (
            "section: {dtype: bfloat}",
            "section.dtype: must be 'float32' or 'bfloat16', not \"bfloat\"; did you mean bfloat16",
        ),
        ("section: {dtype: int8}", 'section.dtype: must be .*, not "int8"$'),
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


def test_all_renamed_keys_are_reported_at_once(tmp_path):
    text = "section:\n  clip: 1\n  steps: none\nsections:\n  a: {names_: x}"
    expected = (
        "--set sections.b.clip=2: sections.b.clip was renamed to max_grad_norm in 0.2; "
        f"{tmp_path}/config.yaml, line 2: section.clip was renamed to max_grad_norm in 0.2; "
        "line 5: sections.a.names_ was renamed to names in 0.2"
    )
    with pytest.raises(UserError) as error:
        read(tmp_path, text, ["sections.b.clip=2"])
    assert str(error.value) == expected


@pytest.mark.parametrize(
    ("key", "overrides", "where"),
    [
        ("section.names.1", (), "{path}, line 3: "),
        ("sections.a.steps", (), "{path}, line 5: "),
        ("section.steps", (), "{path}, line 1: "),  # a default: the enclosing section
        ("section.names", ["section.names=c"], "--set section.names=c: "),
    ],
)
def test_later_errors_name_the_place_of_the_value(tmp_path, key, overrides, where):
    text = "section:\n  names: [a,\n    b]\nsections:\n  a: {steps: 2}"
    config = read(tmp_path, text, overrides)
    with pytest.raises(TransientError) as error, errors_at(config, key):
        raise TransientError("no such thing")
    place = where.format(path=tmp_path / "config.yaml")
    assert str(error.value) == f"{place}{key}: no such thing"


def test_later_errors_of_other_configs_name_the_key():
    named = pytest.raises(UserError, match=r"^section\.steps: too many$")
    with named, errors_at(Config(), "section.steps"):
        raise UserError("too many")
    with named, errors_at(Config(), "section.steps"):
        raise UserError("section.steps: too many")
    stored = dataclass_from(Config, {}, "runs/old")
    with (
        pytest.raises(UserError, match=r"^runs/old: section: wrong$"),
        errors_at(stored, "section"),
    ):
        raise UserError("wrong")


def test_options_set_top_level_keys(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text("section: 1")
    with pytest.raises(UserError, match=r"^--section x: section: must be a mapping"):
        read_dataclass(Config, path, options={"section": "x"})


@pytest.mark.parametrize(
    ("name", "hint"),
    [("steqs", "did you mean Steps? use it"), ("seeds", "use it"), ("zzz", "use it")],
)
def test_did_you_mean(name, hint):
    assert did_you_mean(name, ["Steps", "names"], "use it") == hint


def test_closest_name_ignores_case():
    assert closest_name("STEPS", ["Steps", "names"]) == "Steps"
    assert closest_name("zzz", ["Steps", "names"]) is None


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml", Path("configs/demo")])
def test_shipped_config_is_found_by_name(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert find_config(name) == CONFIG_FOLDER / "demo.yaml"


@pytest.mark.parametrize("name", ["demo.new", "demo.yml", "demo.yaml.yaml", "other/demo"])
def test_similar_name_is_not_a_shipped_config(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="config not found; "):
        find_config(name)
