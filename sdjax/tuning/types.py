"""Tunable merges: families with a vector of bounded numbers.

Axes: parameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm

Values: TypeAlias = Float[Array, " parameters"] | Float[np.ndarray, " parameters"]


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """A number to tune.

    Attributes:
        name: unique name, such as "scale" or "weight[expert_2]".
        start: initial value.
        low: lower bound.
        high: upper bound.
    """

    name: str
    start: float
    low: float
    high: float

    def __post_init__(self) -> None:
        if not all(map(math.isfinite, (self.start, self.low, self.high))):
            raise UserError(f"{self.name}: the start and the bounds must be finite numbers")
        if not self.low < self.high:
            raise UserError(
                f"{self.name}: the lower bound {self.low:g} is not below the upper bound "
                f"{self.high:g}"
            )
        if not self.low <= self.start <= self.high:
            raise UserError(
                f"{self.name}: the bounds [{self.low:g}, {self.high:g}] exclude the start "
                f"{self.start:g}; change either"
            )


@dataclass(frozen=True, kw_only=True, eq=False)
class Tunable:
    """A program, method, recipe or family of merges whose numbers can be tuned.

    Attributes:
        name: name in messages, tables and plots.
        slots: names of the experts, in order.
        parameters: the numbers to tune; at least one.
        bind: values [parameters] to the algorithm, which has the same identity for all values. The
            values may be traced, so that a merge can be differentiated in them.
        write: values [parameters] to the text of the tuned program or recipe.
        suffix: suffix of the file for that text, ".py" or ".yaml".
        gradient_refusal: why the gradient of the merges must not be compiled here, for an untrusted
            program whose gradient the sandbox refuses; it is then tuned by CMA-ES.
    """

    name: str
    slots: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    bind: Callable[[Any], Algorithm]
    write: Callable[[Any], str]
    suffix: str
    gradient_refusal: str | None = None

    @property
    def start(self) -> np.ndarray:
        """The initial values, float64 [parameters]."""
        return np.array([parameter.start for parameter in self.parameters])

    @property
    def bounds(self) -> np.ndarray:
        """The lower and upper bounds, float64 [parameters, 2]."""
        return np.array([(parameter.low, parameter.high) for parameter in self.parameters])


def restricted(tunable: Tunable, numbers: Sequence[int]) -> Tunable:
    """Return a tunable of some numbers, while the others keep their initial values.

    Args:
        tunable: what is tuned.
        numbers: indices of the numbers to tune, in increasing order.
    """
    start, tuned = tunable.start, frozenset(numbers)
    runs = [
        (is_tuned, len(list(run)))
        for is_tuned, run in itertools.groupby(range(len(start)), tuned.__contains__)
    ]

    def complete(values: Any) -> Any:
        """Return all values; by slices, in which `differentiability` follows every number."""
        traced = isinstance(values, jax.core.Tracer)
        values = values if traced else np.asarray(values)
        parts, first, place = [], 0, 0
        for is_tuned, count in runs:
            source = values[first : first + count] if is_tuned else start[place : place + count]
            parts.append(source)
            first, place = first + count * is_tuned, place + count
        return jnp.concatenate(parts) if traced else np.concatenate(parts)

    return replace(
        tunable,
        parameters=tuple(tunable.parameters[number] for number in numbers),
        bind=lambda values: tunable.bind(complete(values)),
        write=lambda values: tunable.write(complete(values)),
    )
