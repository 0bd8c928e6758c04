"""Size of the trusted side of the sandbox, which must not execute source text.

The import-linter contracts in pyproject.toml restrict its imports.
"""

import ast
import io
import tokenize
from pathlib import Path

import sdjax
from sdjax.isolation.confine import ALWAYS, LAYERS

PACKAGE = Path(sdjax.__file__).parent
SANDBOX = PACKAGE / "sandbox"
WORKER_ONLY = ("encode.py", "pretty_print.py")  # files of ir/ that never see a worker's message
TRUSTED = [
    *(SANDBOX / f"{name}.py" for name in ("sandbox", "refusal", "verdict", "signature", "config")),
    *sorted((SANDBOX / "verify").glob("*.py")),
    *(file for file in sorted((SANDBOX / "ir").glob("*.py")) if file.name not in WORKER_ONLY),
]
ISOLATION = sorted((PACKAGE / "isolation").glob("*.py"))


def lines_of_code(file: Path) -> int:
    """Count lines without blank lines, comments and docstrings."""
    text = file.read_text()
    silent = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in {*silent, tokenize.ENDMARKER}:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def test_trusted_side_is_small_enough_to_audit():
    assert sum(map(lines_of_code, TRUSTED)) <= 1_650
    assert sum(map(lines_of_code, ISOLATION)) <= 430


def test_readme_names_every_file_and_layer():
    text = (SANDBOX / "README.md").read_text()
    for file in (*SANDBOX.rglob("*.py"), *ISOLATION):
        assert file.name == "__init__.py" or f"`{file.name}`" in text, file.name
    for layer in (*ALWAYS, *LAYERS):
        assert f"`{layer}`" in text


def test_trusted_side_does_not_execute_source_text():
    for file in TRUSTED:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"exec", "eval", "compile", "__import__"}


if __name__ == "__main__":
    for files in (TRUSTED, ISOLATION):
        for file in files:
            print(f"{lines_of_code(file):5} {file.relative_to(PACKAGE)}")
        print(f"{sum(map(lines_of_code, files)):5} lines of code\n")
