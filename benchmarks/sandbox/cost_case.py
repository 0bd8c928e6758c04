"""A case of `primitive_costs.py`: a primitive, and operands of a given size.

A case names a primitive and builds operands of about a given number of elements. Several sets of
values are tried per case and the slowest counts, since a candidate picks its operands.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.sandbox.ir.primitives import ALLOWED

WITH_KEYS = ("random_bits", "random_split", "random_fold_in", "random_unwrap")
REAL = ("float32", "bfloat16", "float16")
INTEGER = ("int32", "int8")
ALL = (*REAL, *INTEGER, "bool", "complex64")
# Magnitudes that are slow somewhere: reductions of large arguments, reflections, iterations.
VALUES = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "huge": lambda rng, n: rng.uniform(1e37, 3e38, n),
    "large": lambda rng, n: rng.uniform(1e4, 1e6, n),
    "negative": lambda rng, n: -rng.uniform(1e3, 1e4, n) - 0.5,
    "small": lambda rng, n: rng.uniform(1e-4, 1e-2, n),
    "tiny": lambda rng, n: rng.uniform(2e-38, 9e-38, n),
    "denormal": lambda rng, n: rng.uniform(1e-45, 1e-39, n),
    "near one": lambda rng, n: 1 - rng.uniform(1e-7, 1e-2, n),
}
PAIRS = (("normal", "normal"), ("huge", "tiny"), ("large", "near one"), ("tiny", "huge"),
         ("denormal", "normal"), ("negative", "small"))  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Case:
    """One primitive on operands of one kind.

    Attributes:
        primitive: name in the allow-list.
        label: what distinguishes it from other cases of the primitive.
        make: from number of elements and names of values to operands; raises TypeError if JAX has
            no such operation.
        params: decoded parameters, given the operands.
        values: names of values to try.
    """

    primitive: str
    label: str
    make: Callable[[int, Sequence[str]], list[Any]]
    params: Callable[[list[Any]], dict[str, Any]] = field(default=lambda operands: {})
    values: Sequence[Sequence[str]] = (("normal",),)

    def run(self, operands: list[Any]) -> list[Any]:
        """Apply the primitive to operands whose keys are words, and return words for keys."""
        params = self.params(operands)
        if self.primitive in WITH_KEYS:
            keys = jax.random.wrap_key_data(operands[0], impl="threefry2x32")
            operands = [keys, *operands[2:]]
        results = ALLOWED[self.primitive].bind(*operands, **params)
        results = list(results) if isinstance(results, (list, tuple)) else [results]
        return [
            jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
            for x in results
        ]


@dataclass(frozen=True, kw_only=True)
class ControlFlowCase(Case):
    """A loop or a branch, which has no entry in the allow-list.

    Attributes:
        function: what to run on the operands.
    """

    function: Callable[..., Any]

    def run(self, operands: list[Any]) -> list[Any]:
        """Run the function."""
        return list(self.function(*operands))


def draw(kind: str, shape: tuple[int, ...], dtype: str, seed: int = 0) -> np.ndarray:
    """Return an array of a kind of values, clipped to the range of its dtype."""
    rng = np.random.default_rng(seed)
    size = math.prod(shape)
    values = VALUES[kind](rng, size)
    if dtype == "bool":
        return (values > np.median(values)).reshape(shape)
    if dtype in INTEGER:
        bounds = np.iinfo(dtype)
        scaled = values * (1 if kind in ("huge", "large", "negative") else bounds.max / 8)
        return np.clip(scaled, bounds.min, bounds.max).astype(dtype).reshape(shape)
    if dtype == "complex64":
        return (values + 1j * VALUES[kind](rng, size)).astype(dtype).reshape(shape)
    return jnp.asarray(np.asarray(values, np.float32), dtype).reshape(shape)


def square(size: int) -> tuple[int, int]:
    """Return the sides of a matrix of about `size` elements."""
    side = max(1, math.isqrt(size))
    return side, max(1, size // side)


def several(size: int, count: int) -> list[Any]:
    """Return matrices of about `size` elements together."""
    return [draw("normal", square(size // count + 1), "float32", i) for i in range(count)]


def case_of(
    primitive: str,
    label: str,
    make: Callable[[int], list[Any]],
    params: Callable[[list[Any]], dict[str, Any]] | None = None,
    **fixed: Any,
) -> Case:
    """Return a case whose operands depend on the size only."""
    return Case(
        primitive=primitive,
        label=label,
        make=lambda size, kinds: make(size),
        params=params or (lambda operands: fixed),
    )
