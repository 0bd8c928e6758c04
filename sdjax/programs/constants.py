"""Tunable constants of a merge program, and their places in the text.

A constant is a number with a decimal point, or an expression of numbers alone such as `-0.5` or
`1 / 3`. Its use decides what it is:

* Stays: exponents, indices, axes, shapes, counts, tolerances (up to 1e-4), huge numbers (from 1e4),
  zeros, the 1 in `1.0 - x`, `1.0 + x` and `1.0 / x`, the 1 or -1 that limits or replaces something
  (`jnp.maximum(x, 1.0)`, `jnp.where(x > 0, x, 1.0)`), integers, arguments of NumPy and `math`, and
  whatever Python itself has to know (`if`, `while`, `and`, `int`, `range`).
* Tunable: everything else, and integers and zeros that stand in a list, tuple or dict of weights
  next to such a number.
* Tunable, but without a gradient, which `sdjax.tuning.differentiability` finds out: thresholds such
  as the number in `depth < 0.5`.

Hyperparameters that the program already has (`float`, `PerExpert`) are tunable by their defaults.

The source is hostile text. It is parsed and never executed here. Pass text that the sandbox has
admitted: its workers have parsed the same text under the limits in `sdjax.sandbox.config`.
"""

from __future__ import annotations

import ast
import builtins
import keyword
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from sdjax.core.errors import UserError
from sdjax.programs.syntax import (
    Place,
    annotation,
    called,
    defaults_of,
    identifiers,
    imported,
    is_fractional,
    movable_statements,
    number,
    parse_program,
    place_of,
)
from sdjax.sandbox.ir.calling_convention import REQUESTS

SMALL, HUGE = 1e-4, 1e4


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Builtins, called by their bare name, whose arguments Python has to know.
_STATIC_BUILTINS = _words("int float bool str range round len isinstance print")
# Functions of JAX whose arguments are all shapes, counts or seeds.
_STATIC_FUNCTIONS = _words("zeros ones empty arange eye PRNGKey key fold_in")
# Functions of JAX, and methods of its arrays, in which only the array may be traced.
_ONE_ARRAY = _words(
    """reshape expand_dims broadcast_to tile repeat roll split array_split hsplit vsplit dsplit
    top_k round around round_"""
)
_ARRAY_KEYWORDS = _words("a A ary array arr x operand")
_STATIC_MODULES = ("math", "numpy")
_STATIC_KEYWORDS = _words("axis axes ord shape dtype eps epsilon tol rtol atol rcond decimals")
_TOLERANCES = _words("eps epsilon tol tolerance rtol atol")
_POWERS = _words("power float_power pow")
_LIMITS = _words("maximum minimum clip max min")
# Call -> position and keyword of an argument, and its bounds.
_BOUNDED_ARGUMENTS: dict[str, tuple[int, str, tuple[float, float]]] = {
    "quantile": (1, "q", (0.0, 1.0)),
    "nanquantile": (1, "q", (0.0, 1.0)),
    "percentile": (1, "q", (0.0, 100.0)),
    "nanpercentile": (1, "q", (0.0, 100.0)),
    "bernoulli": (1, "p", (0.0, 1.0)),
}


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A tunable constant of a program.

    Attributes:
        name: name of the hyperparameter that replaces it, or that it is the default of.
        expert: position of the expert, if the hyperparameter is a PerExpert.
        start: its value in the text.
        low: lower bound.
        high: upper bound.
        place: first line, first byte in it, last line, last byte in it (exclusive), as in `ast`.
        operand: whether it is part of arithmetic, so that a negative number needs parentheses.
        is_default: whether it is the default of a parameter of the merge function.
    """

    name: str
    expert: int | None = None
    start: float
    low: float
    high: float
    place: Place
    operand: bool = False
    is_default: bool = False


@dataclass(frozen=True, kw_only=True)
class _Use:
    """How an expression is used.

    Attributes:
        static: a constant here stays.
        hint: name for a constant here; None for a numbered one.
        weights: it is in a list, tuple or dict that contains a number with a decimal point.
        bounds: bounds of a constant here, if its use tells.
        divisor: it divides something.
        operand: it is part of arithmetic.
    """

    static: bool = False
    hint: str | None = None
    weights: bool = False
    bounds: tuple[float, float] | None = None
    divisor: bool = False
    operand: bool = False

    def inside(self) -> _Use:
        """Return the use of a part of the expression, about which less is known."""
        return _Use(static=self.static, operand=True)


_PLAIN, _STATIC = _Use(), _Use(static=True)


def find_constants(source: str, slots: Sequence[str]) -> list[Constant]:
    """Return the tunable constants of a program: its hyperparameters, then the others in order.

    Args:
        source: text of a program that the sandbox has admitted.
        slots: names of the experts, in order.

    Raises:
        UserError: see `parse_program`.
    """
    tree, function = parse_program(source)
    reader = _Reader(tree)
    try:
        reader.read_parameters(function, slots)
        reader.statements(function.body)
        for statement in movable_statements(tree, function):
            reader.visit(statement, _PLAIN)
    except RecursionError:
        raise UserError("the program is nested too deeply") from None
    defaults = [constant for constant in reader.found if constant.is_default]
    others = [constant for constant in reader.found if not constant.is_default]
    return [*defaults, *_named(sorted(others, key=lambda c: c.place), reader.names)]


class _Reader:
    """Visitor that collects constants.

    Attributes:
        found: the constants, with provisional names.
        names: all identifiers of the program.
    """

    def __init__(self, tree: ast.Module) -> None:
        self._modules = dict(imported(tree))
        self._functions = {x.name for x in ast.walk(tree) if isinstance(x, ast.FunctionDef)}
        self.found: list[Constant] = []
        self.names = set(identifiers(tree))

    def read_parameters(self, function: ast.FunctionDef, slots: Sequence[str]) -> None:
        """Collect the defaults of the merge function's hyperparameters."""
        for argument, default in defaults_of(function):
            annotated = annotation(argument)
            if argument.arg in REQUESTS or argument.arg in _TOLERANCES:
                continue
            if annotated == "PerExpert":
                self._per_expert(argument.arg, default, slots)
            elif annotated == "float" or (annotated is None and is_fractional(default)):
                value = number(default)
                if value is not None and not 0 < abs(value) <= SMALL:
                    self._add(default, value, _Use(hint=argument.arg), is_default=True)

    def _per_expert(self, name: str, default: ast.expr, slots: Sequence[str]) -> None:
        """Collect one constant per expert: from one number for all of them, or from one each."""
        nodes: list[ast.expr] = [default] * len(slots)
        if isinstance(default, ast.Tuple | ast.List):
            nodes = default.elts
        elif isinstance(default, ast.Dict):
            keys = [key.value if isinstance(key, ast.Constant) else None for key in default.keys]
            by_slot = dict(zip(keys, default.values, strict=True))
            nodes = [by_slot[slot] for slot in slots if slot in by_slot]
        values = [number(node) for node in nodes]
        if len(nodes) != len(slots) or None in values:
            return
        for expert, (node, value) in enumerate(zip(nodes, values, strict=True)):
            assert value is not None
            self._add(node, value, _Use(hint=name), is_default=True, expert=expert)

    def statements(self, nodes: Iterable[ast.AST]) -> None:
        """Visit statements, or expressions of which nothing is known."""
        for node in nodes:
            self.visit(node, _PLAIN)

    def visit(self, node: ast.AST, use: _Use) -> None:
        """Collect the constants of a statement or an expression."""
        calculated = number(node)
        if calculated is not None and isinstance(node, ast.expr):
            self._constant(node, calculated, use)
            return
        match node:
            case ast.JoinedStr() | ast.Constant():
                pass
            case ast.FunctionDef() | ast.Lambda():
                for argument, default in defaults_of(node):
                    self.visit(default, _Use(hint=argument.arg))
                body = node.body if isinstance(node.body, list) else [node.body]
                self.statements(body)
            case ast.ClassDef():
                self.statements(node.body)
            case ast.Assign(targets=[target, *_], value=value):
                self._assigned(target, value)
            case ast.AnnAssign(target=target, value=ast.expr() as value):
                self._assigned(target, value)
            case ast.AugAssign(op=op, value=value):
                self.visit(value, self._right(op, _PLAIN))
            case ast.For(target=target, iter=iterator):
                self._loop(target, iterator)
                self.statements([*node.body, *node.orelse])
            case ast.comprehension(target=target, iter=iterator, ifs=conditions):
                self._loop(target, iterator)
                for condition in conditions:
                    self.visit(condition, _STATIC)
            case ast.If(test=test) | ast.While(test=test) | ast.IfExp(test=test):
                self.visit(test, _STATIC)
                for child in ast.iter_child_nodes(node):
                    if child is not test:
                        self.visit(child, use if isinstance(node, ast.IfExp) else _PLAIN)
            case ast.Assert() | ast.BoolOp() | ast.pattern():
                pass
            case ast.match_case(guard=_, body=body):
                self.statements(body)
            case ast.BinOp():
                self._arithmetic(node, use)
            case ast.Compare(left=left, comparators=others):
                on_depth = any(isinstance(x, ast.Name) and x.id == "depth" for x in (left, *others))
                bounds = (0.0, 1.0) if on_depth else None
                for operand in (left, *others):
                    self.visit(operand, replace(use.inside(), bounds=bounds))
            case ast.Subscript(value=value):
                self.visit(value, use)
            case ast.Call():
                self._call(node, use)
            case ast.List() | ast.Tuple() | ast.Set():
                hints = [_joined(use.hint, str(i + 1)) for i in range(len(node.elts))]
                self._items(node.elts, hints, use)
            case ast.Dict(keys=keys, values=values):
                labels = [
                    str(key.value) if isinstance(key, ast.Constant) else str(i + 1)
                    for i, key in enumerate(keys)
                ]
                self._items(values, [_joined(use.hint, label) for label in labels], use)
            case _:
                inside = use.inside() if isinstance(node, ast.UnaryOp) else replace(use, hint=None)
                for child in ast.iter_child_nodes(node):
                    self.visit(child, inside)

    def _assigned(self, target: ast.expr, value: ast.expr) -> None:
        sequences = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple | ast.List)
        if sequences and len(target.elts) == len(value.elts):  # type: ignore[attr-defined]
            for name, item in zip(target.elts, value.elts, strict=True):  # type: ignore[attr-defined]
                self._assigned(name, item)
            return
        hint = target.id if isinstance(target, ast.Name) else None
        self.visit(value, _Use(hint=hint, static=hint in _TOLERANCES))

    def _loop(self, target: ast.expr, iterator: ast.expr) -> None:
        """Visit what a loop runs over; in `zip`, values have the names of the loop's variables."""
        match target, iterator:
            case ast.Tuple(elts=[_, item]), ast.Call(
                func=ast.Name(id="enumerate"), args=[argument, *_]
            ):
                self._loop(item, argument)
            case ast.Tuple(elts=targets), ast.Call(func=ast.Name(id="zip"), args=arguments) if len(
                targets
            ) == len(arguments):
                for name, argument in zip(targets, arguments, strict=True):
                    self._assigned(name, argument)
            case _:
                self._assigned(target, iterator)

    def _arithmetic(self, node: ast.BinOp, use: _Use) -> None:
        """Visit both sides of an operator; the 1 of a complement or a reciprocal stays."""
        inside = use.inside()
        is_one = number(node.left) == 1 and isinstance(node.op, ast.Add | ast.Sub | ast.Div)
        is_power = isinstance(node.op, ast.Pow)  # its base keeps its sign, as a divisor does
        self.visit(node.left, _STATIC if is_one else replace(inside, divisor=is_power))
        self.visit(node.right, self._right(node.op, inside))

    @staticmethod
    def _right(op: ast.operator, use: _Use) -> _Use:
        """Return the use of an operator's right side."""
        if isinstance(op, ast.Pow | ast.FloorDiv | ast.Mod):
            return _STATIC
        return replace(use, divisor=isinstance(op, ast.Div))

    def _call(self, node: ast.Call, use: _Use) -> None:
        name, module = called(node.func, self._modules)
        if isinstance(node.func, ast.Attribute):
            self.visit(node.func.value, use.inside())
        traced = 0 if use.static else self._count_traced(node, name, module)
        position, keyword, bounds = _BOUNDED_ARGUMENTS.get(name, (None, "", None))
        # `jnp.array([0.5, 0.3])` names its numbers as the list alone would.
        hint = use.hint if name in ("array", "asarray", "float32") else None
        for i, argument in enumerate(node.args):
            fixed = (name in _POWERS and i == 1) or _is_guard(name, node.args, argument)
            own = _Use(static=fixed or (traced is not None and i >= traced), hint=hint)
            if i == position:
                own = replace(own, bounds=bounds)
            self.visit(argument, own)
        for item in node.keywords:
            is_array = bool(traced) and item.arg in _ARRAY_KEYWORDS
            static = item.arg in _STATIC_KEYWORDS or (traced is not None and not is_array)
            own = _Use(static=static, hint=item.arg)
            if item.arg == keyword and keyword:
                own = replace(own, bounds=bounds)
            self.visit(item.value, own)

    def _count_traced(self, node: ast.Call, name: str, module: str) -> int | None:
        """Return the number of leading arguments that may be traced; None for all arguments."""
        if module in _STATIC_MODULES:
            return 0
        if isinstance(node.func, ast.Name) and not module:
            return 0 if name in _STATIC_BUILTINS and name not in self._functions else None
        if name in _ONE_ARRAY:
            return 1 if module else 0  # the array of a method is not an argument
        return 0 if module and name in _STATIC_FUNCTIONS else None

    def _items(self, items: Sequence[ast.expr], hints: Sequence[str | None], use: _Use) -> None:
        weights = any(is_fractional(item) for item in items)
        for item, hint in zip(items, hints, strict=True):
            own = replace(use, hint=hint, weights=weights, operand=False)
            self.visit(item, own)

    def _constant(self, node: ast.expr, value: float, use: _Use) -> None:
        if use.static or not (use.weights or is_fractional(node)):
            return
        if not use.weights and not SMALL < abs(value) < HUGE:
            return
        self._add(node, value, use)

    def _add(
        self,
        node: ast.expr,
        value: float,
        use: _Use,
        *,
        is_default: bool = False,
        expert: int | None = None,
    ) -> None:
        low, high = _bounds(value, use)
        self.found.append(
            Constant(
                name=use.hint or "",
                expert=expert,
                start=value,
                low=low,
                high=high,
                place=place_of(node),
                operand=use.operand,
                is_default=is_default,
            )
        )


def _bounds(value: float, use: _Use) -> tuple[float, float]:
    if use.bounds is not None and use.bounds[0] <= value <= use.bounds[1]:
        return use.bounds
    if use.divisor and value:  # must not become zero
        low, high = sorted((value / 4, value * 4))
        return low, high
    reach = max(1.0, 2 * abs(value))
    return value - reach, value + reach


def _named(constants: Sequence[Constant], taken: Iterable[str]) -> Iterator[Constant]:
    """Yield the constants with unique names that mean nothing else in the program."""
    used = {*taken, *REQUESTS, *keyword.kwlist, *dir(builtins)}
    counts: Counter[str] = Counter()
    for constant in constants:
        stem = re.sub(r"\W", "_", constant.name, flags=re.ASCII)[:40].strip("_")
        if re.match(r"[A-Za-z]", stem):
            name, prefix = stem, f"{stem}_"
        else:
            name, prefix = "", "c"
        while not name or name in used:
            counts[prefix] += 1
            name = f"{prefix}{counts[prefix]}"
        used.add(name)
        yield replace(constant, name=name)


def _is_guard(name: str, arguments: Sequence[ast.expr], argument: ast.expr) -> bool:
    """Return whether an argument is a 1 or -1 that limits or replaces the others."""
    if number(argument) not in (1, -1):
        return False
    if name == "where":  # next to another number, it is a choice of weights
        return not any(number(other) not in (None, 1, -1) for other in arguments[1:])
    return name in _LIMITS


def _joined(hint: str | None, part: str) -> str | None:
    return None if hint is None else f"{hint}_{part}"
