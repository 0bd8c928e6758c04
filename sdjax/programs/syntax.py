"""Syntax of merge programs: the parts of a syntax tree that the reader of constants asks for.

The source is hostile text. It is parsed and never executed here. Pass text that the sandbox has
admitted: its workers have parsed the same text under the limits in `sdjax.sandbox.config`.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterator

from sdjax.core.errors import UserError

ENTRY_POINTS = ("merge_models", "merge_trees")
Place = tuple[int, int, int, int]
"""First line, first byte in it, last line, last byte in it (exclusive), as in `ast`."""


def parse_program(source: str) -> tuple[ast.Module, ast.FunctionDef]:
    """Return the syntax tree of a program, and its merge function.

    Raises:
        UserError: not valid Python, nested too deeply, or no merge function.
    """
    try:
        tree = ast.parse(source)
    except SyntaxError as error:
        raise UserError(f"line {error.lineno or 1}: {error.msg}") from None
    except (RecursionError, MemoryError):
        raise UserError("the program is nested too deeply") from None
    except ValueError:
        raise UserError("the program is not valid text") from None
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name in ENTRY_POINTS:
            return tree, node
    raise UserError("no function merge_models(task_vectors) or merge_trees(task_vectors)")


def movable_statements(tree: ast.Module, function: ast.FunctionDef) -> list[ast.stmt]:
    """Return the statements outside the merge function that can be moved to its beginning.

    There, helper functions and values see the merge function's parameters. Imports and the
    docstring stay. Nothing moves if a name would mean something else.
    """
    outside = [
        node
        for node in tree.body
        if node is not function and not isinstance(node, ast.Import | ast.ImportFrom | ast.Expr)
    ]
    bound = {name for node in outside for name in _bound_at_top(node)}
    early = [*function.decorator_list, function.args, *filter(None, [function.returns])]
    used_early = {n.id for part in early for n in ast.walk(part) if isinstance(n, ast.Name)}
    inner = {name for node in function.body for name in _bound_anywhere(node)}
    inner |= {argument.arg for argument in arguments(function)}
    scoped = any(isinstance(node, ast.Global | ast.Nonlocal) for node in ast.walk(tree))
    return [] if scoped or bound & (used_early | inner) else outside


def place_of(node: ast.expr) -> Place:
    """Return where an expression is in the text."""
    assert node.end_lineno is not None
    assert node.end_col_offset is not None
    return node.lineno, node.col_offset, node.end_lineno, node.end_col_offset


def number(node: ast.AST) -> float | None:
    """Return the value of an expression of numbers alone; None for anything else."""
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _finite(value)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            negated = number(operand)
            return None if negated is None else -negated
        case ast.UnaryOp(op=ast.UAdd(), operand=operand):
            return number(operand)
        case ast.BinOp(left=left, op=op, right=right):
            second = number(right)
            first = None if second is None else number(left)  # the deep side
            if first is not None and second is not None:
                return _calculated(op, first, second)
    return None


def _calculated(op: ast.operator, left: float, right: float) -> float | None:
    match op:
        case ast.Add():
            return _finite(left + right)
        case ast.Sub():
            return _finite(left - right)
        case ast.Mult():
            return _finite(left * right)
        case ast.Div() if right:
            return _finite(left / right)
    return None


def _finite(number: float) -> float | None:
    try:
        value = float(number)
    except OverflowError:  # a huge integer
        return None
    return value if math.isfinite(value) else None


def is_fractional(node: ast.AST) -> bool:
    """Return whether a number is written with a decimal point, an exponent or a division."""
    return number(node) is not None and any(
        isinstance(part, ast.Div)
        or (isinstance(part, ast.Constant) and isinstance(part.value, float))
        for part in ast.walk(node)
    )


def arguments(function: ast.FunctionDef | ast.Lambda) -> list[ast.arg]:
    """Return all parameters of a function."""
    every = function.args
    variadic = [argument for argument in (every.vararg, every.kwarg) if argument is not None]
    return [*every.posonlyargs, *every.args, *every.kwonlyargs, *variadic]


def defaults_of(function: ast.FunctionDef | ast.Lambda) -> list[tuple[ast.arg, ast.expr]]:
    """Return the parameters that have a default, with it."""
    every = function.args
    positional = [*every.posonlyargs, *every.args]
    with_default = positional[len(positional) - len(every.defaults) :]
    keyword_only = zip(every.kwonlyargs, every.kw_defaults, strict=True)
    return [
        *zip(with_default, every.defaults, strict=True),
        *((argument, default) for argument, default in keyword_only if default is not None),
    ]


def annotation(argument: ast.arg) -> str | None:
    """Return the last part of an annotation's name; "" if it is not a name."""
    match argument.annotation:
        case None:
            return None
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
        case ast.Constant(value=str() as text):
            return text.strip().rpartition(".")[2]
    return ""


def called(function: ast.expr, modules: dict[str, str]) -> tuple[str, str]:
    """Return the last part of a called function's name, and the module that it starts with."""
    name = function.attr if isinstance(function, ast.Attribute) else ""
    root = function
    while isinstance(root, ast.Attribute):
        root = root.value
    if not isinstance(root, ast.Name):
        return name, ""
    return name or root.id, modules.get(root.id, "")


def imported(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (local name, top-level package) of the imports; jax.numpy counts as jax."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                package = alias.name.partition(".")[0]
                yield alias.asname or package, package
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                yield alias.asname or alias.name, node.module.partition(".")[0]


def identifiers(tree: ast.Module) -> Iterator[str]:
    """Yield every name that a program binds, reads or passes by keyword."""
    for node in ast.walk(tree):
        for attribute in ("id", "arg", "name", "asname", "attr", "rest"):
            if isinstance(value := getattr(node, attribute, None), str):
                yield value.partition(".")[0]


def _bound_at_top(node: ast.stmt) -> Iterator[str]:
    """Yield the names that a top-level statement binds in the module."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        yield node.name
    else:
        yield from _bound_anywhere(node)


def _bound_anywhere(node: ast.AST) -> Iterator[str]:
    for part in ast.walk(node):
        if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store):
            yield part.id
        elif isinstance(part, ast.FunctionDef | ast.ClassDef):
            yield part.name
        elif isinstance(part, ast.arg):
            yield part.arg
        elif isinstance(part, ast.alias):
            yield part.asname or part.name.partition(".")[0]
