"""Check that a merge has a gradient in its numbers; name the operation that prevents it.

A comparison, the indices of a sort or a rounding has the derivative zero wherever it has one, so a
number that only acts through them, such as a threshold on the depth, cannot be tuned by gradient.

Axes: parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

# Operations with floating-point results whose derivative is zero.
_FLAT = frozenset({"sign", "floor", "ceil", "round", "nextafter", "stop_gradient"})
# Control flow that reverse-mode differentiation does not support.
FORWARD_ONLY = frozenset({"while"})
# Operations that only move elements.
_STRUCTURAL = frozenset(
    {"slice", "squeeze", "reshape", "concatenate", "broadcast_in_dim", "transpose", "expand_dims"}
    | {"stack", "unstack", "copy", "rev", "split"}
)
# Elements up to which an array is followed element by element: these analyses run in this process.
_MAX_FOLLOWED = 1 << 16

# What an array depends on: element by element, 1 + the index of a number or 0; or as a whole.
_Source: TypeAlias = np.ndarray | frozenset[int]
_NOTHING: frozenset[int] = frozenset()


def blocking_operations(
    function: Callable[[jax.Array], Any], size: int
) -> dict[int, tuple[str, ...]]:
    """Return, for each number without a gradient, the operations that prevent it.

    Args:
        function: maps the values [parameters] to arrays; it is only traced.
        size: number of values.

    Returns:
        index of the number to operations; none if the function does not depend on it at all.
    """
    closed = jax.make_jaxpr(function)(jax.ShapeDtypeStruct((size,), np.float32))
    analysis = _Analysis()
    outputs = analysis.run(closed.jaxpr, [np.arange(1, size + 1, dtype=np.int32)])
    reached = frozenset[int]().union(*map(_numbers, outputs))
    blocked = {}
    for index in range(size):
        if found := analysis.refused.get(index):
            blocked[index] = tuple(sorted(found))
        elif index not in reached:
            blocked[index] = tuple(sorted(analysis.flat.get(index, ())))
    return blocked


class _Analysis:
    """Propagation of the numbers in which a variable may have a derivative other than zero.

    Attributes:
        flat: number to the operations with derivative zero that it reaches.
        refused: number to the operations without a reverse-mode derivative that it reaches.
    """

    def __init__(self) -> None:
        self.flat: dict[int, set[str]] = {}
        self.refused: dict[int, set[str]] = {}

    def run(self, jaxpr: core.Jaxpr, inputs: Sequence[_Source]) -> list[_Source]:
        sources: dict[core.Var, _Source] = dict(zip(jaxpr.invars, inputs, strict=True))
        for equation in jaxpr.eqns:
            operands = [_read(sources, atom) for atom in equation.invars]
            if any(map(_numbers, operands)):
                results = self._apply(equation, operands)
                sources.update(zip(equation.outvars, results, strict=True))
        return [_read(sources, atom) for atom in jaxpr.outvars]

    def _apply(self, equation: core.JaxprEqn, operands: Sequence[_Source]) -> Sequence[_Source]:
        name = equation.primitive.name
        numbers = frozenset[int]().union(*map(_numbers, operands))
        if name in _STRUCTURAL and (moved := _move(equation, operands)) is not None:
            return moved
        if name in FORWARD_ONLY:
            _note(self.refused, numbers, name)
        elif name == "scan":
            return self._scan(equation, operands)
        elif (inner := _called(equation.params, operands)) is not None:
            return self.run(inner, operands)
        smooth = [name not in _FLAT and _is_float(var) for var in equation.outvars]
        if not any(smooth):
            _note(self.flat, numbers, name)
        return [numbers if kept else _NOTHING for kept in smooth]

    def _scan(self, equation: core.JaxprEqn, operands: Sequence[_Source]) -> list[_Source]:
        """Return the sources of the results of a loop, as after any number of rounds."""
        inner = equation.params["jaxpr"].jaxpr
        # What is sliced or stacked has one more axis outside than inside. Versions of JAX have
        # different names for the counts.
        last = sum(map(_has_same_rank, equation.invars, inner.invars))
        first = last - sum(map(_has_same_rank, equation.outvars, inner.outvars))
        # Constants are the same arrays in every round; the others are known as a whole.
        sources = [*operands[:first], *map(_numbers, operands[first:])]
        while True:
            results = [_numbers(result) for result in self.run(inner, sources)]
            carried = [_numbers(a) | b for a, b in zip(sources[first:last], results, strict=False)]
            if carried == sources[first:last]:
                # The results of no round at all are the initial ones.
                return [*carried, *results[last - first :]]
            sources[first:last] = carried


def _move(equation: core.JaxprEqn, operands: Sequence[_Source]) -> list[_Source] | None:
    """Apply a structural operation to the sources, if they are known element by element."""
    variables = (*equation.invars, *equation.outvars)
    if any(math.prod(_aval(variable).shape) > _MAX_FOLLOWED for variable in variables):
        return None
    arrays = [
        np.zeros(_aval(atom).shape, np.int32) if isinstance(x, frozenset) and not x else x
        for atom, x in zip(equation.invars, operands, strict=True)
    ]
    if not all(isinstance(array, np.ndarray) for array in arrays):
        return None
    with jax.ensure_compile_time_eval():
        moved = equation.primitive.bind(*map(jnp.asarray, arrays), **equation.params)
    results = moved if equation.primitive.multiple_results else [moved]
    return [np.asarray(result) for result in results]


def _numbers(source: _Source) -> frozenset[int]:
    if isinstance(source, frozenset):
        return source
    return frozenset((np.unique(source[source > 0]) - 1).tolist())


def _note(operations: dict[int, set[str]], numbers: frozenset[int], name: str) -> None:
    for number in numbers:
        operations.setdefault(number, set()).add(name)


def _read(sources: Mapping[core.Var, _Source], atom: Any) -> _Source:
    return _NOTHING if isinstance(atom, core.Literal) else sources.get(atom, _NOTHING)


def _is_float(var: core.Var) -> bool:
    return jnp.issubdtype(_aval(var).dtype, jnp.floating)


def _aval(atom: Any) -> Any:
    return atom.aval


def _has_same_rank(first: Any, second: Any) -> bool:
    return len(_aval(first).shape) == len(_aval(second).shape)


def _called(params: Mapping[str, Any], operands: Sequence[Any]) -> core.Jaxpr | None:
    """Return the function that an equation calls with its own operands (jit, custom_jvp)."""
    for value in params.values():
        jaxpr = getattr(value, "jaxpr", value)
        if isinstance(jaxpr, core.Jaxpr) and len(jaxpr.invars) == len(operands):
            return jaxpr
    return None
