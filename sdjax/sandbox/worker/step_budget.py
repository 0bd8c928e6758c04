"""Step budget: stops endless candidates at the same point on every machine.

A step is one iteration of a loop or comprehension, or one call of a function that the candidate
defines. Long computations without steps, such as `sum(range(10**12))`, are limited by the clocks.
"""

import ast
from collections.abc import Callable

from sdjax.sandbox.refusal import Refusal

COUNTER = "__step__"  # the text rules forbid such names in candidates


def insert_step_counter(tree: ast.Module) -> ast.Module:
    """Return a tree that calls the counter in every loop and function."""
    return ast.fix_missing_locations(_InsertStepCounter().visit(tree))


def step_counter(limit: int) -> Callable[[int], bool]:
    """Return a new counter, which raises Refusal after `limit` steps."""
    steps = 0

    def step(line: int) -> bool:
        nonlocal steps
        steps += 1
        if steps > limit:
            raise Refusal(
                "too costly",
                "steps",
                f"line {line}: tracing takes more than {limit} Python loop iterations and calls;"
                " a loop does not end, or works element by element: use array operations",
            )
        return True

    return step


def _call(node: ast.AST) -> ast.Call:
    line = getattr(node, "lineno", 1)
    call = ast.Call(ast.Name(COUNTER, ast.Load()), [ast.Constant(line)], [])
    return ast.copy_location(call, node) if hasattr(node, "lineno") else call


class _InsertStepCounter(ast.NodeTransformer):
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
