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


WRONG_ARGUMENTS = """
import sdjax
from sdjax.core.errors import UserError

config, params = sdjax.load_model("zoo:seed")
decoder = sdjax.Decoder(config, tokenizer=sdjax.load_tokenizer("zoo:seed"))
merged = sdjax.merge(params, [params], "linear")
for call in (
    lambda: decoder.generate(params, "12+34="),
    lambda: decoder.generate(merged, ["12+34="]),
    lambda: sdjax.evaluate(params, "arithmetic"),
):
    try:
        call()
    except UserError as error:
        print(error)
"""


def test_wrong_arguments_raise_user_errors():
    # In a process of its own, because types are checked in this one.
    done = subprocess.run([sys.executable, "-c", WRONG_ARGUMENTS], capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert "prompts must be a list of texts; pass [prompt]" in lines[0]
    assert "not MergedModel" in lines[1]
    assert "merged.params" in lines[1]
    assert "model must be a name" in lines[2]
