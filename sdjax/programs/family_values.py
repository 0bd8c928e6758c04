"""Abstract values of arrays, which `sdjax.programs.family_rules` computes with."""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np

_ARITHMETIC: dict[str, Callable[..., float]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "log": math.log,
}
# Operations whose result has the same tags as their first operand.
TRANSPARENT = {
    *("reshape", "transpose", "squeeze", "convert_element_type", "copy", "optimization_barrier"),
    *("broadcast_in_dim", "expand_dims", "slice", "dynamic_slice", "rev", "stop_gradient"),
}


@dataclass(frozen=True)
class Value:
    """Abstract value of an array.

    Attributes:
        experts: inputs that the array depends on: experts, "base" and "depth".
        tags: properties such as "magnitude" or "norm"; see `FamilyReader.primitive`.
        constant: value of a constant scalar, else None.
        form: mapping from atom to coefficient; empty if the array is not a linear form. Atoms are
            tensors that are not linear forms themselves.
        scalar: whether the array has a single element.
        parts: values along the first axis of a stack.
    """

    experts: frozenset[str] = frozenset()
    tags: frozenset[str] = frozenset()
    constant: float | None = None
    form: dict[int, float] = field(default_factory=dict)
    scalar: bool = False
    parts: tuple[Value, ...] = ()

    @property
    def sources(self) -> frozenset[str]:
        """The inputs that are experts."""
        return self.experts - {"base", "depth"}


def union(values: Sequence[Value]) -> Value:
    """Return a value with the inputs and tags of all values."""
    experts = frozenset[str]().union(*(v.experts for v in values))
    tags = frozenset[str]().union(*(v.tags for v in values))
    return Value(experts=experts, tags=tags, scalar=all(v.scalar for v in values))


def constant_value(value: Any) -> Value:
    """Return the value of a constant array; only single numbers are tracked."""
    dtype = jax.dtypes.result_type(value)
    if np.size(value) != 1 or not jax.numpy.issubdtype(dtype, np.number) or dtype.kind == "c":
        return Value(scalar=np.size(value) == 1)
    return Value(constant=float(np.asarray(value).reshape(())), scalar=True)


def evaluated(name: str, values: Sequence[float]) -> Value:
    """Return the result of a primitive on constants; the value is unknown for rare primitives."""
    constant = None
    if name in TRANSPARENT:
        constant = values[0]
    elif name in _ARITHMETIC:
        with contextlib.suppress(ArithmeticError, ValueError):
            constant = _ARITHMETIC[name](*values)
    return Value(constant=constant, scalar=True)
