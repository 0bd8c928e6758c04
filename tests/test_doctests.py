"""The examples in the docstrings of the public API."""

import doctest
import inspect

import pytest

import sdjax

PUBLIC = [name for name in sdjax.__all__ if not name.startswith("_")]


def doctests_of(name):
    finder = doctest.DocTestFinder(exclude_empty=True, recurse=True)
    return [test for test in finder.find(getattr(sdjax, name), name) if test.examples]


@pytest.mark.parametrize("name", PUBLIC)
def test_examples_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tests = doctests_of(name)
    assert tests, f"sdjax.{name} has no example"
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    for test in tests:
        test.globs = {"__name__": "doctest"}
        assert runner.run(test).failed == 0, test.name


@pytest.mark.parametrize("name", PUBLIC)
def test_docstrings_describe_arguments(name):
    value = getattr(sdjax, name)
    text = inspect.getdoc(value) or ""
    if inspect.isclass(value):
        text += inspect.getdoc(value.__init__) or ""
    assert "Args:" in text, f"sdjax.{name}"
