"""The trusted side stays small, and leans on nothing but itself."""

import ast
import io
import tokenize
from pathlib import Path

from sdjax.isolation.confine import ALWAYS, LAYERS
from sdjax.sandbox import sandbox

ROOM = Path(sandbox.__file__).parent
PARENT = (
    *("sandbox", "verdict", "contract", "layout", "primitives", "decode", "rebuild", "cost"),
    *("trial", "hashes", "code-size", "probe"),
)
ELSEWHERE = {"trial": ("sdjax.merging.compile_cache",)}  # the compiler's options
LOCK = ("confine", "seccomp", "landlock", "server", "fork_server")


def lines(name: str) -> int:
    """Lines of code: without blank ones, comments and documentation."""
    text = (ROOM / f"{name}.py").read_text()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    found: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in {*silent, tokenize.ENDMARKER}:
            found.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            found -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(found)


def imports(name: str) -> set[str]:
    """What a file imports of the package at its top."""
    tree = ast.parse((ROOM / f"{name}.py").read_text())
    modules = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
    return {module for module in modules if module.startswith("sdjax.")}


def test_the_trusted_side_is_small_enough_to_audit():
    counted = {name: lines(name) for name in (*PARENT, *LOCK)}
    assert sum(counted[name] for name in PARENT) <= 1_450, counted
    assert sum(counted[name] for name in LOCK) <= 430, counted


def test_it_imports_nothing_else_of_the_package():
    room = {f"sdjax.sandbox.{name}" for name in (*PARENT, *LOCK)}
    for name in (*PARENT, *LOCK):
        assert imports(name) <= {*room, "sdjax.core.errors", *ELSEWHERE.get(name, ())}, name


def test_the_readme_names_every_file_and_layer():
    text = (ROOM / "README.md").read_text()
    for file in ROOM.glob("*.py"):
        assert file.name == "__init__.py" or f"`{file.name}`" in text, file.name
    for layer in (*ALWAYS, *LAYERS):
        assert f"`{layer}`" in text


def test_no_file_of_the_parent_executes_source():
    for name in (*PARENT, "probe"):
        for node in ast.walk(ast.parse((ROOM / f"{name}.py").read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"exec", "eval", "compile", "__import__"}


if __name__ == "__main__":
    for side in (PARENT, LOCK):
        print(f"{sum(map(lines, side)):5} lines of code:", *side)
