"""Examples in the docstrings of the public API."""

import doctest
import sys

import pytest

import sdjax

ANNOTATIONS = ("PerExpert",)  # without a docstring; docs/merge-method.md has its example
PUBLIC = [n for n in sdjax.__all__ if not n.startswith("_") and n not in ANNOTATIONS]


def doctests_of(name):
    value = getattr(sdjax, name)
    names = {**vars(sys.modules[value.__module__]), "sdjax": sdjax}
    found = doctest.DocTestFinder().find(value, name, globs=names)
    return [test for test in found if test.examples]


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = doctests_of(name)
    assert tests, f"sdjax.{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        assert runner.run(test).failed == 0, test.name
