"""A budget of Python steps, so that an endless program ends alike on every machine.

Every loop round, comprehension round and call of a function of the program itself counts as one
step. What runs long without any of these (`sum(range(10**12))`) is left to the clocks.
"""

import ast
from collections.abc import Callable

from sdjax.sandbox.refusal import Refusal

COUNTER = "__step__"  # the text rules keep programs from using such a name


def counted(tree: ast.Module) -> ast.Module:
    """The same program with a call of the counter in every loop and function."""
    return ast.fix_missing_locations(_Counted().visit(tree))


def counter(limit: int) -> Callable[[int], bool]:
    """A fresh counter; it raises a Refusal at the step after `limit`."""
    taken = 0

    def step(line: int) -> bool:
        nonlocal taken
        taken += 1
        if taken > limit:
            raise Refusal(
                "too costly",
                "steps",
                f"line {line}: tracing takes more than {limit} rounds of Python loops and calls;"
                " a loop does not end, or works element by element: use array operations",
            )
        return True

    return step


def _call(node: ast.AST) -> ast.Call:
    line = getattr(node, "lineno", 1)
    call = ast.Call(ast.Name(COUNTER, ast.Load()), [ast.Constant(line)], [])
    return ast.copy_location(call, node) if hasattr(node, "lineno") else call


class _Counted(ast.NodeTransformer):
    def _body(self, node: ast.For | ast.While | ast.FunctionDef) -> ast.AST:
        self.generic_visit(node)
        node.body.insert(0, ast.copy_location(ast.Expr(_call(node)), node))
        return node

    visit_For = visit_While = visit_FunctionDef = _body

    def visit_Lambda(self, node: ast.Lambda) -> ast.AST:
        self.generic_visit(node)
        node.body = ast.copy_location(ast.BoolOp(ast.And(), [_call(node), node.body]), node)
        return node

    def visit_comprehension(self, node: ast.comprehension) -> ast.AST:
        self.generic_visit(node)
        node.ifs.insert(0, _call(node.iter))
        return node
