"""The abstract interpreter that reads a merge program's families. See `families.py`."""

import ast
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from sdjax.programs.grammar_operations import compare, operation, product, quotient, total
from sdjax.programs.grammar_values import (
    ANY,
    CONST,
    LASTING,
    Value,
    collection,
    element_of,
    expert,
    highest,
    join,
    lasting,
    of_dict,
    parameter,
)

_MAX_STEPS = 20_000
_MAX_CALLS = 6


class _BudgetSpent(Exception):
    """The program is too long to follow; what was found so far stands."""


@dataclass
class Reader:
    slots: int
    found: set[str] = field(default_factory=set)
    functions: dict[str, ast.FunctionDef | ast.Lambda] = field(default_factory=dict)
    steps: int = 0
    calls: int = 0

    def read(self, tree: ast.Module) -> frozenset[str]:
        for node in tree.body:
            if isinstance(node, ast.FunctionDef):
                self.functions[node.name] = node
            elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
                for target in node.targets:
                    if isinstance(target, ast.Name):
                        self.functions[target.id] = node.value
        main = self.functions.get("merge_models") or self.functions.get("merge_trees")
        if not isinstance(main, ast.FunctionDef):
            return frozenset()
        env: dict[str, Value] = {}
        for i, argument in enumerate(main.args.args + main.args.kwonlyargs):
            env[argument.arg] = parameter(i, argument.arg)
        try:
            result = self.body(main.body, env)
        except _BudgetSpent:
            return frozenset(self.found)
        used = result.experts if result is not None else frozenset()
        if used and ANY not in used and len(used) < self.slots:
            self.found.add("subset")
        if result is not None:
            self.found |= {"depth_ramp"} if "depth" in result.tags else set()
            self.found |= {"base_relative"} if "base" in result.tags else set()
        return frozenset(self.found)

    # Statements

    def body(self, statements: Sequence[ast.stmt], env: dict[str, Value]) -> Value | None:
        result: Value | None = None
        for statement in statements:
            returned = self.statement(statement, env)
            if returned is not None:
                result = returned if result is None else join([result, returned])
        return result

    def statement(self, node: ast.stmt, env: dict[str, Value]) -> Value | None:
        match node:
            case ast.Return(value=value) if value is not None:
                return self.value(value, env)
            case ast.Assign(targets=targets, value=value):
                if isinstance(value, ast.Lambda) and isinstance(targets[0], ast.Name):
                    self.functions[targets[0].id] = value
                    return None
                worth = self.value(value, env)
                for target in targets:
                    self.bind(target, worth, env)
            case ast.AnnAssign(target=target, value=value) if value is not None:
                self.bind(target, self.value(value, env), env)
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=value):
                whole = ast.BinOp(left=ast.Name(id=name), op=op, right=value)
                self.bind(target, self.value(whole, env), env)
            case ast.FunctionDef():
                self.functions[node.name] = node
            case ast.For(target=target, iter=iterable, body=inner):
                worth = self.value(iterable, env)
                result = None
                for _ in range(2):
                    self.bind(target, element_of(worth), env)
                    result = self.body(inner, env) or result
                return result
            case ast.If(test=test, body=inner, orelse=other):
                self.value(test, env)
                results = [self.body(inner, env), self.body(other, env)]
                kept = [r for r in results if r is not None]
                return join(kept) if kept else None
            case ast.While(body=inner) | ast.With(body=inner):
                return self.body(inner, env)
            case ast.Expr(value=ast.Call(func=ast.Attribute(attr=attr, value=owner)) as call):
                added = [self.value(a, env) for a in call.args]
                if attr in ("append", "extend") and isinstance(owner, ast.Name) and added:
                    old = env.get(owner.id, Value(rank="list"))
                    env[owner.id] = replace(join([old, *added]), rank="list", items=())
        return None

    def bind(self, target: ast.expr, value: Value, env: dict[str, Value]) -> None:
        if isinstance(target, ast.Name):
            env[target.id] = value
        elif isinstance(target, ast.Tuple | ast.List):
            parts: Sequence[Value] = value.items
            if value.rank == "list" and "experts" in value.tags:
                parts = [expert(f"expert_{i + 1}") for i in range(len(target.elts))]
            if len(parts) != len(target.elts):
                parts = [element_of(value)] * len(target.elts)
            for element, part in zip(target.elts, parts, strict=True):
                self.bind(element, part, env)
        elif isinstance(target, ast.Subscript) and isinstance(target.value, ast.Name):
            old = env.get(target.value.id, Value(rank="list"))
            env[target.value.id] = replace(join([old, value]), rank="list", items=())

    # Expressions

    def value(self, node: ast.expr, env: dict[str, Value]) -> Value:
        self.steps += 1
        if self.steps > _MAX_STEPS:
            raise _BudgetSpent
        match node:
            case ast.Constant(value=constant):
                if not isinstance(constant, int | float):
                    return Value()
                return CONST if constant else CONST.tagged("zero")
            case ast.Name(id=name):
                return env.get(name, Value())
            case ast.Tuple(elts=elements) | ast.List(elts=elements) | ast.Set(elts=elements):
                return collection([self.value(e, env) for e in elements])
            case ast.Dict(keys=keys, values=values):
                names = tuple(str(k.value) for k in keys if isinstance(k, ast.Constant))
                return replace(collection([self.value(v, env) for v in values]), keys=names)
            case ast.UnaryOp(op=op, operand=operand):
                worth = self.value(operand, env)
                return worth.tagged("negative") if isinstance(op, ast.USub) else worth
            case ast.BinOp():
                return self.binary(node, env)
            case ast.Compare(left=left, comparators=rights):
                return compare(self.found, self.value(left, env), self.value(rights[0], env))
            case ast.BoolOp(values=values):
                return join([self.value(v, env) for v in values]).bare(*LASTING)
            case ast.IfExp(test=test, body=body, orelse=other):
                self.value(test, env)
                return join([self.value(body, env), self.value(other, env)])
            case ast.Subscript():
                return self.subscript(node, env)
            case ast.ListComp() | ast.GeneratorExp() | ast.SetComp() | ast.DictComp():
                return self.comprehension(node, env)
            case ast.Call():
                return self.call(node, env)
            case ast.NamedExpr(target=target, value=value):
                worth = self.value(value, env)
                self.bind(target, worth, env)
                return worth
            case ast.Attribute(value=owner):
                worth = self.value(owner, env)
                return worth if node.attr == "T" else CONST
            case ast.Starred(value=inner):
                return self.value(inner, env)
        return Value()

    def subscript(self, node: ast.Subscript, env: dict[str, Value]) -> Value:
        owner = self.value(node.value, env)
        index = node.slice
        if owner.rank == "dict":
            if isinstance(index, ast.Constant):
                return expert(str(index.value))
            keys = self.value(index, env).keys or (ANY,)
            return Value(rank="tensor", experts=frozenset(keys), tags=frozenset({"each"}))
        if owner.rank == "list":
            if isinstance(index, ast.Slice):
                if "experts" in owner.tags and (index.lower or index.upper or index.step):
                    self.found.add("subset")
                return owner
            if owner.keys:
                return replace(join(owner.items), items=()).tagged("own")
            place = index.value if isinstance(index, ast.Constant) else None
            if isinstance(place, int):
                if "experts" in owner.tags and 0 <= place < self.slots:
                    return expert(f"expert_{place + 1}")
                if -len(owner.items) <= place < len(owner.items):
                    return owner.items[place]
            return element_of(owner) if not isinstance(index, ast.Tuple) else owner
        return owner

    def comprehension(
        self,
        node: ast.ListComp | ast.GeneratorExp | ast.SetComp | ast.DictComp,
        env: dict[str, Value],
    ) -> Value:
        inner = dict(env)
        for part in node.generators:
            self.bind(part.target, element_of(self.value(part.iter, inner)), inner)
        worth = self.value(node.value if isinstance(node, ast.DictComp) else node.elt, inner)
        return replace(worth, rank="list", items=()).tagged("of_" + worth.rank)

    def binary(self, node: ast.BinOp, env: dict[str, Value]) -> Value:
        left, right = self.value(node.left, env), self.value(node.right, env)
        out = Value(
            rank=highest([left, right]),
            experts=left.experts | right.experts,
            tags=lasting([left, right]),
        )
        match node.op:
            case ast.Mult():
                return product(self.found, node, left, right, out)
            case ast.Div():
                return quotient(self.found, left, right, out)
            case ast.Add() | ast.Sub():
                return total(self.found, node, left, right, out)
            case ast.Pow():
                if isinstance(node.right, ast.Constant) and node.right.value in (2, 2.0):
                    return out.tagged("magnitude" if left.rank != "scalar" else "spread")
                if "magnitude" in left.tags and left.rank == "tensor":
                    self.found.add("power")
                return out.tagged(*left.tags & {"spread", "dot", "magnitude"})
            case ast.MatMult():
                return out
        return out

    # Calls

    def call(self, node: ast.Call, env: dict[str, Value]) -> Value:
        name = _called(node.func)
        method = isinstance(node.func, ast.Attribute) and not _is_module(node.func.value, env)
        owner = self.value(node.func.value, env) if method else None  # type: ignore[attr-defined]
        nodes = list(node.args)
        arguments = [self.value(a, env) for a in nodes]
        keywords = {k.arg: k.value for k in node.keywords if k.arg}
        if owner is not None:
            if owner.rank == "dict":
                return of_dict(name, arguments, nodes)
            arguments, nodes = [owner, *arguments], [node.func.value, *nodes]  # type: ignore[attr-defined]
        elif name in self.functions and isinstance(node.func, ast.Name):
            return self.helper(self.functions[name], arguments)
        arguments += [self.value(v, env) for k, v in keywords.items() if k not in ("axis", "ord")]
        return operation(self.found, name, nodes, arguments, keywords)

    def helper(self, function: ast.FunctionDef | ast.Lambda, arguments: list[Value]) -> Value:
        if self.calls >= _MAX_CALLS:
            return join(arguments)
        self.calls += 1
        try:
            env = {
                wanted.arg: value
                for wanted, value in zip(function.args.args, arguments, strict=False)
            }
            if isinstance(function, ast.Lambda):
                return self.value(function.body, env)
            return self.body(function.body, env) or Value()
        finally:
            self.calls -= 1


def _called(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _is_module(node: ast.expr, env: dict[str, Value]) -> bool:
    """Whether `node` reads as a module (`jnp`, `jnp.linalg`), not as a bound value."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id not in env


def families_of_source(source, *, slots=3):
    try:
        return Reader(slots).read(ast.parse(source))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return frozenset()
