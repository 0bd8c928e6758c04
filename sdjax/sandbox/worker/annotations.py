"""Checks of annotations, which Python or a library may evaluate as expressions."""

import ast
import re
from collections.abc import Callable

from sdjax.sandbox.refusal import Refusal

Refuse = Callable[[str, str], Refusal]  # (rule, message) -> refusal with the line number

# Dimensions of a jaxtyping annotation that `isinstance` does not evaluate as an expression.
DIMENSION = re.compile(r"\.\.\.|[*#?]*([A-Za-z_]\w*=)?(\d+|[A-Za-z_]\w*)?", re.ASCII)
# Syntax of an annotation that is written as a string.
TYPE_EXPRESSIONS = (
    ast.Expression,
    ast.Name,
    ast.Attribute,
    ast.Subscript,
    ast.Constant,
    ast.Tuple,
    ast.List,
    ast.BinOp,
    ast.BitOr,
    ast.Load,
)


def shape_types(tree: ast.Module) -> frozenset[str]:
    """Return the local names of jaxtyping's types of arrays, which take dimensions."""
    return frozenset(
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "jaxtyping"
        for alias in node.names
        if alias.name != "Array"
    )


def check_shape(arguments: ast.expr, refuse: Refuse) -> None:
    """Refuse a jaxtyping annotation unless its dimensions are plain: names, numbers, "..."."""
    match arguments:
        case ast.Tuple(elts=[_, ast.Constant(value=str(dimensions))]):
            if all(DIMENSION.fullmatch(dimension) for dimension in dimensions.split()):
                return
    raise refuse(
        "annotation", "the dimensions of an annotation must be a string of names and numbers"
    )


def expressions_in_strings(node: ast.AST, refuse: Refuse) -> list[ast.Expression]:
    """Return what the strings in the annotation of a node mean, or in a string of an annotation.

    Raises:
        Refusal: the annotation is a string, but not a plain type such as "float".
    """
    match node:
        case ast.arg(annotation=annotation) | ast.AnnAssign(annotation=annotation):
            pass
        case ast.FunctionDef(returns=annotation) | ast.Expression(body=annotation):
            pass
        case _:
            return []
    found = []
    for text in ast.walk(annotation) if annotation else ():
        if not isinstance(text, ast.Constant) or not isinstance(text.value, str):
            continue
        if expression := _parsed(text):
            if text is annotation and not isinstance(node, ast.Expression):
                _check_type_expression(expression, refuse)
            found.append(expression)
    return found


def _parsed(text: ast.Constant) -> ast.Expression | None:
    """Parse a string of an annotation; None if it is text that Python cannot evaluate."""
    try:
        tree = ast.parse(str(text.value).strip(), mode="eval")
    except (SyntaxError, ValueError):
        return None
    return ast.increment_lineno(tree, text.lineno - 1)


def _check_type_expression(tree: ast.Expression, refuse: Refuse) -> None:
    for node in ast.walk(tree):
        if not isinstance(node, TYPE_EXPRESSIONS):
            kind = type(node).__name__
            raise refuse("annotation", f"an annotation must be a type; {kind} is not allowed")
