"""YAML documents that expand, nest or are large: one reader for configs and recipes."""

import itertools
import re

import pytest

from sdjax.core import yaml
from sdjax.core.errors import UserError
from sdjax.search.config import read_config

LETTERS = "abcdefghi"


def aliases(prefix, suffix):
    """Return a document in which each line has nine aliases of the line before."""
    lines = ["a: &a {x: 1}"]
    for before, name in itertools.pairwise(LETTERS):
        items = ", ".join([f"*{before}"] * 9)
        lines.append(f"{name}: &{name} {prefix}[{items}]{suffix}")
    return "\n".join(lines)


DOCUMENTS = {
    "aliases": (aliases("", ""), "nested too deeply or too large; at most"),
    "merge keys": (aliases("{<<: ", "}"), "nested too deeply or too large; at most"),
    "recursive alias": ("a: &a [*a]", "recursive alias"),
    "lists": ("[" * 20_000, "nested too deeply"),
    "mappings": ("{a: " * 5_000, "nested too deeply"),
    "characters": ("# " + "x" * yaml.MAX_CHARACTERS, "too large; at most 1,000,000 characters"),
    "surrogate": ('a:\n  seed: "\\ud800"', "line 2: seed: '\\ud800' contains half of a surrogate"),
    "surrogate in a list": ('a: [1, "\\udfff"]', "line 1: a: '\\udfff' contains half of a"),
    "surrogate in a key": ('"\\ud800": 1', "line 1: '\\ud800' contains half of a surrogate pair"),
    "escape": ('a: "\\U00110000"', "not valid YAML"),
    "digits": ("iterations: " + "9" * 5_000, "invalid value '999"),
}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_that_expand_are_refused_in_one_line(tmp_path, name):
    text, message = DOCUMENTS[name]
    path = tmp_path / "file.yaml"
    path.write_text(text)
    for read in (read_config, yaml.YamlDocument.read):
        if read is not read_config and name == "digits":
            continue  # a value, which only a schema reads
        with pytest.raises(UserError, match=re.escape(message)) as error:
            read(path)
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 400


def test_parsing_ends_at_the_largest_number_of_values(monkeypatch):
    monkeypatch.setattr(yaml, "MAX_VALUES", 10)
    with pytest.raises(UserError, match="x: too large; at most 10 values"):
        yaml.YamlDocument("[" + "1, " * 10 + "*unknown]", "x")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *(("12:30", "12:30"), ("1:30.5", "1:30.5"), ("2001-01-01", "2001-01-01")),
        *(("1_000", 1000), ("-7", -7), ("0x1f", 31), ("010", 8), ("0b11", 3), ("+1.5e3", 1500.0)),
        *(("1e-6", 1e-6), ("1.", 1.0), (".5", 0.5), ("-.inf", -float("inf")), ("1.5", 1.5)),
        *(("08", "08"), ("1e", "1e"), ("--1", "--1")),
    ],
)
def test_numbers_are_decimal_not_base_60(text, value):
    document = yaml.YamlDocument(text, "x")
    read = document.value(document.root)
    assert (type(read), read) == (type(value), value)


@pytest.mark.parametrize("tag", ["int", "float"])
@pytest.mark.parametrize("text", ["1:30", "1" + ":1" * 9_000, "9" * 5_000, "0x" + "f" * 5_000])
def test_tagged_numbers_in_base_60_or_of_many_digits_are_refused(tag, text):
    document = yaml.YamlDocument(f"!!{tag} {text}", "x")
    with pytest.raises(UserError, match="line 1: invalid value '"):
        document.value(document.root)
