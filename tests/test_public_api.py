"""`import sdjax`: lazy, typed and complete."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import sdjax

PACKAGE = Path(sdjax.__file__).parent


def test_import_does_not_import_jax():
    code = "import sys, sdjax; dir(sdjax); print({'jax', 'numpy', 'flax'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "set()"


def test_every_name_resolves_to_its_module():
    for name in sdjax.__all__:
        assert getattr(sdjax, name) is not None
    assert set(sdjax.__all__) <= set(dir(sdjax))


def test_types_and_lazy_imports_agree():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    typed = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert typed == sdjax._MODULE_OF
    assert {*typed, "__version__"} == set(sdjax.__all__)
    assert (PACKAGE / "py.typed").exists()


def test_unknown_name_raises_attribute_error():
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = sdjax.nothing
