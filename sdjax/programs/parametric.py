"""Parametric form of a merge program: its constants as float hyperparameters.

The form is a program of the algorithm API like any other, so that the sandbox admits it, and other
values compile nothing. Tuned numbers are put back into the original text, whose comments and layout
are kept.

Replacing a constant by an argument changes a merge by float32 rounding at most: XLA folds and
reorders arithmetic with literals, and Python computes `0.1 * 3` in float64.
"""

from __future__ import annotations

import ast
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from sdjax.core.errors import UserError
from sdjax.programs.constants import Constant
from sdjax.programs.syntax import Place, defaults_of, movable_statements, parse_program, place_of


def parametric_form(source: str, constants: Sequence[Constant]) -> str:
    """Return the program with keyword parameters, annotated `float`, in place of constants.

    The text depends on the program's syntax and these constants alone, not on its layout.

    Args:
        source: text of the program.
        constants: some of its constants, from `find_constants`.

    Raises:
        UserError: the program is nested too deeply.
    """
    tree, function = parse_program(source)
    outside = movable_statements(tree, function)
    replaced = [constant for constant in constants if not constant.is_default]
    rewriter = _Rewriter({constant.place: constant.name for constant in replaced})
    try:
        function.body = [rewriter.visit(statement) for statement in function.body]
        inside = rewriter.count
        for statement in outside:
            rewriter.visit(statement)
        if rewriter.count > inside:  # helpers see the parameters inside the merge function only
            start = 0 if ast.get_docstring(function) is None else 1
            function.body[start:start] = outside
            tree.body = [statement for statement in tree.body if statement not in outside]
        for argument, _ in defaults_of(function):
            if argument.annotation is None and argument.arg in {c.name for c in constants}:
                argument.annotation = _name("float")
        for constant in replaced:
            function.args.kwonlyargs.append(ast.arg(constant.name, _name("float")))
            function.args.kw_defaults.append(ast.Constant(constant.start))
        return ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    except RecursionError:
        raise UserError("the program is nested too deeply") from None


def with_values(source: str, constants: Sequence[Constant], values: Sequence[float]) -> str:
    """Return the program's text with other numbers in place of constants.

    Args:
        source: text of the program.
        constants: some of its constants, from `find_constants`.
        values: their new values; a constant that has its value already keeps its text.
    """
    data = source.encode()
    starts = [0, *itertools.accumulate(len(line) for line in data.splitlines(keepends=True))]
    by_place: dict[Place, list[tuple[Constant, float]]] = {}
    for constant, value in zip(constants, values, strict=True):
        by_place.setdefault(constant.place, []).append((constant, float(value)))
    for place in sorted(by_place, reverse=True):
        if all(constant.start == value for constant, value in by_place[place]):
            continue
        first, last = starts[place[0] - 1] + place[1], starts[place[2] - 1] + place[3]
        text = ", ".join(repr(value) for _, value in by_place[place])
        (constant, value), *more = by_place[place]
        if more or (constant.operand and value < 0 and data[first : first + 1] != b"-"):
            text = f"({text})"
        data = data[:first] + text.encode() + data[last:]
    return data.decode()


class _Rewriter(ast.NodeTransformer):
    """Transformer that replaces expressions at some places by names.

    Attributes:
        count: number of expressions that have been replaced.
    """

    def __init__(self, names: Mapping[Place, str]) -> None:
        self._names = names
        self.count = 0

    def visit(self, node: ast.AST) -> Any:
        """Return the name that replaces a node, or the node."""
        if isinstance(node, ast.expr) and (name := self._names.get(place_of(node))):
            self.count += 1
            return _name(name)
        return self.generic_visit(node)


def _name(text: str) -> ast.Name:
    return ast.Name(id=text, ctx=ast.Load())
