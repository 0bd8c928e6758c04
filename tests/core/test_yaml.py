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
