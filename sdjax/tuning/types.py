"""Tunable merges: families with a vector of bounded numbers.

Axes: parameters.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

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
