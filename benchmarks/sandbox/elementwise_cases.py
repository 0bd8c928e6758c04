"""Arithmetic, comparisons, logic and functions, in each dtype that has them."""

from collections.abc import Iterator, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from benchmarks.sandbox.cost_case import (
    ALL,
    INTEGER,
    PAIRS,
    REAL,
    VALUES,
    Case,
    case_of,
    draw,
    square,
)


def _elementwise(
    names: str, arity: int, dtypes: Sequence[str] = ALL, remark: str = "", **params: Any
) -> Iterator[Case]:
    singles, pairs = [(kind,) for kind in VALUES], PAIRS
    for name in names.split():
        for dtype in dtypes:

            def make(size: int, kinds: Sequence[str], dtype: str = dtype) -> list[Any]:
                names = kinds if len(kinds) == arity else (kinds * arity)[:arity]
                return [draw(k, square(size), dtype, i) for i, k in enumerate(names)]

            values = {1: singles, 2: pairs}.get(arity, (("normal",),))
            plain = dtype == "bool"
            yield Case(
                primitive=name,
                label=dtype + remark,
                make=make,
                params=lambda operands, p=params: p,
                values=values[:1] if plain else values,
            )


def elementwise_cases() -> Iterator[Case]:
    """Yield arithmetic, comparisons, logic and functions, in each dtype that has them."""
    yield from _elementwise("neg sign floor ceil abs not is_finite square real imag conj", 1)
    yield from _elementwise("population_count clz", 1, INTEGER)
    yield from _elementwise("add add_any sub mul div rem max min and or xor", 2)
    yield from _elementwise("atan2 nextafter complex pow", 2, (*REAL, "complex64"))
    yield from _elementwise("eq ne lt le gt ge eq_to lt_to le_to", 2, ("float32", "int32", "bool"))
    yield from _elementwise("eq ne", 2, ("complex64",))
    yield from _elementwise("shift_left shift_right_logical shift_right_arithmetic", 2, INTEGER)
    yield from _elementwise("clamp", 3, ("float32", "int32"))
    yield from _elementwise("round", 1, REAL, rounding_method=lax.RoundingMethod.TO_NEAREST_EVEN)
    yield from _elementwise("round", 1, REAL, rounding_method=lax.RoundingMethod.AWAY_FROM_ZERO)
    for exponent in (2, 63, -63):
        yield from _elementwise(
            "integer_pow", 1, ("float32", "int32", "complex64"), f", power {exponent}", y=exponent
        )
    yield from _elementwise("reduce_precision", 1, REAL, exponent_bits=5, mantissa_bits=3)
    for name in ("float32", "float16", "int8", "complex64"):
        yield from _elementwise(
            "convert_element_type",
            1,
            ("float32", "float16", "int32", "complex64"),
            f" to {name}",
            new_dtype=jnp.dtype(name),
        )
    for name in ("uint32", "int8", "float16"):
        yield from _elementwise("bitcast_convert_type", 1, ("float32",), new_dtype=jnp.dtype(name))
    yield from _elementwise(
        "exp exp2 log log1p expm1 sin cos tan tanh logistic log2 sqrt rsqrt cbrt asin acos atan"
        " sinh cosh asinh acosh atanh one_minus_square",
        1,
        (*REAL, "complex64"),
    )
    yield from _elementwise("erf erfc erf_inv lgamma digamma bessel_i0e bessel_i1e", 1, REAL)
    for terms in (4, 64):
        yield case_of(
            "polynomial",
            f"{terms} coefficients",
            lambda n, t=terms: [draw("normal", square(n), "float32"), *map(np.float32, range(t))],
        )
    for count in (2, 16, 256):
        index = "bool" if count == 2 else "int32"
        yield case_of(
            "select_n",
            f"{count} cases",
            lambda n, c=count, i=index: [
                (np.arange(n // c + 1) % c).astype(i),
                *(draw("normal", (n // c + 1,), "float32", k) for k in range(c)),
            ],
        )
