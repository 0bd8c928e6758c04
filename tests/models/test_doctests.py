import doctest
import importlib

import pytest


@pytest.mark.parametrize("name", ["models.nnx", "models.params"])
def test_docstring_examples_pass(name):
    results = doctest.testmod(importlib.import_module(f"sdjax.{name}"))
    assert results.attempted
    assert not results.failed
