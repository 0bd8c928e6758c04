"""Resolution of names: which expressions of a candidate refer to modules.

Python's scopes are followed, so that a local variable may have the name of a module.
"""

import ast
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from sdjax.sandbox.worker.imports import IMPORTS

_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


@dataclass(frozen=True, eq=False)
class Scope:
    """One scope.

    Attributes:
        parent: enclosing scope; None for the module.
        is_class: whether it is the body of a class, whose names its functions do not see.
        names: module by bound name; None if something else is bound to it.
    """

    parent: "Scope | None" = None
    is_class: bool = False
    names: dict[str, str | None] = field(default_factory=dict)

    def module_of(self, node: ast.expr) -> str | None:
        """Return the module that an expression such as `jax.numpy` or `jnp` refers to, if any."""
        if isinstance(node, ast.Attribute) and (parent := self.module_of(node.value)):
            path = f"{parent}.{node.attr}"
            return path if path in IMPORTS else None
        return self._find(node.id) if isinstance(node, ast.Name) else None

    def _find(self, name: str) -> str | None:
        scope: Scope | None = self
        while scope is not None:
            if name in scope.names and (scope is self or not scope.is_class):
                return scope.names[name]
            scope = scope.parent
        return None

    def bind(self, nodes: Iterable[ast.AST]) -> None:
        """Add the names that statements or expressions bind in this scope.

        A name that is bound to a module and to something else counts as the module.
        """
        outer: set[str] = set()
        bound: set[str] = set()
        aliases: list[tuple[str, ast.expr]] = []
        for node in nodes:
            match node:
                case ast.Import(names=imported):
                    for alias in imported:
                        first = alias.name.partition(".")[0]
                        self.names[alias.asname or first] = alias.name if alias.asname else first
                case ast.ImportFrom(module=module, names=imported):
                    for alias in imported:
                        local, path = alias.asname or alias.name, f"{module}.{alias.name}"
                        self.names[local] = path if path in IMPORTS else self.names.get(local)
                case (
                    ast.Assign(targets=[ast.Name() as target], value=ast.expr() as value)
                    | ast.AnnAssign(target=ast.Name() as target, value=ast.expr() as value)
                    | ast.NamedExpr(target=target, value=value)
                ):
                    aliases.append((target.id, value))
                    bound.add(target.id)
                case ast.Global(names=declared) | ast.Nonlocal(names=declared):
                    outer.update(declared)
                case ast.Name(ctx=ast.Store() | ast.Del()):
                    bound.add(node.id)
                case ast.arg():
                    bound.add(node.arg)
                case ast.MatchMapping(rest=str(rest)):
                    bound.add(rest)
                case ast.alias():
                    pass
                case _:  # functions, classes, exceptions and patterns have a name
                    bound.update(n for n in [getattr(node, "name", None)] if isinstance(n, str))
        known = -1
        while known < len(self.names):  # an alias may stand for another one
            known = len(self.names)
            found = ((name, self.module_of(value)) for name, value in aliases)
            self.names.update((name, path) for name, path in found if path)
        self.names.update(dict.fromkeys(bound - outer - self.names.keys()))


def module_references(tree: ast.AST, scope: Scope) -> dict[ast.expr, str]:
    """Return the module by expression that refers to one, such as `jnp` and `jax.numpy`.

    Args:
        tree: a syntax tree.
        scope: the scope that it is in. For a whole candidate, its names are added.
    """
    found: dict[ast.expr, str] = {}
    if isinstance(tree, ast.Module):
        scope.bind(_in_scope(tree.body))
    _Visitor(scope, found).visit(tree)
    return found


def aliased(tree: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions that are assigned to one name of the same scope, not of a class."""
    nodes = list(ast.walk(tree))
    of_classes, elsewhere = set(), set()
    for node in nodes:
        if isinstance(node, ast.ClassDef):
            of_classes.update(node.body)
        elif isinstance(node, (ast.Global, ast.Nonlocal)):
            elsewhere.update(node.names)
    for node in nodes:
        match node:
            case (
                ast.Assign(targets=[ast.Name() as target], value=ast.expr() as value)
                | ast.AnnAssign(target=ast.Name() as target, value=ast.expr() as value)
                | ast.NamedExpr(target=target, value=value)
            ) if node not in of_classes and target.id not in elsewhere:
                yield value


def _in_scope(nodes: Iterable[ast.AST]) -> Iterator[ast.AST]:
    """Yield nodes and their descendants, but not the insides of other scopes."""
    for node in nodes:
        yield node
        if isinstance(node, _COMPREHENSIONS):
            # An assignment expression in a comprehension binds outside of it.
            yield from (n for n in ast.walk(node) if isinstance(n, ast.NamedExpr))
        elif not isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            yield from _in_scope(ast.iter_child_nodes(node))


def _parameters(arguments: ast.arguments) -> list[ast.arg]:
    several = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs]
    return several + [one for one in (arguments.vararg, arguments.kwarg) if one is not None]


class _Visitor(ast.NodeVisitor):
    """Visitor that follows the scopes."""

    def __init__(self, scope: Scope, found: dict[ast.expr, str]):
        self.scope, self.found = scope, found

    def generic_visit(self, node: ast.AST) -> None:
        if isinstance(node, (*_FUNCTIONS, ast.ClassDef)):
            body = node.body if isinstance(node.body, list) else [node.body]
            inside = set(body)
            for child in ast.iter_child_nodes(node):  # decorators, defaults, bases
                if child not in inside:
                    self.visit(child)
            bound = [] if isinstance(node, ast.ClassDef) else _parameters(node.args)
            self._enter([*bound, *_in_scope(body)], body, isinstance(node, ast.ClassDef))
        elif isinstance(node, _COMPREHENSIONS):
            targets = [n for g in node.generators for n in ast.walk(g.target)]
            self._enter(targets, ast.iter_child_nodes(node), False)
        else:
            super().generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        if isinstance(node.ctx, ast.Load) and (module := self.scope.module_of(node)):
            self.found[node] = module

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.visit(node.value)
        path = f"{self.found.get(node.value)}.{node.attr}"
        if isinstance(node.ctx, ast.Load) and path in IMPORTS:
            self.found[node] = path

    def visit_NamedExpr(self, node: ast.NamedExpr) -> None:
        self.visit(node.value)
        if node.value in self.found:
            self.found[node] = self.found[node.value]

    def _enter(self, bound: Iterable[ast.AST], body: Iterable[ast.AST], is_class: bool) -> None:
        scope = Scope(self.scope, is_class)
        scope.bind(bound)
        inner = _Visitor(scope, self.found)
        for node in body:
            inner.visit(node)
