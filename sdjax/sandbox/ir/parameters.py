"""Decoders for the parameters of primitives: from JSON values to the values that JAX binds.

Each decoder raises ValueError on an invalid value. The values come from an untrusted worker, so
every decoder checks the exact type (`True` is not the integer 1) and the range.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

MAX_RANK = 8
MAX_DIMENSION = 1 << 40

_TYPES = "bool int8 int16 int32 uint8 uint16 uint32 float16 bfloat16 float32 complex64"
DTYPES: dict[str, np.dtype] = {name: jnp.dtype(name) for name in _TYPES.split(" ")}
KEY_IMPL = next(
    (
        equation.params.get("impl")
        for equation in jax.make_jaxpr(lambda: jax.random.key(0, impl="threefry2x32"))().eqns
        if equation.primitive.name == "random_seed"
    ),
    None,
)
KEY_DTYPE = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype

ParameterDecoder = Callable[[Any], Any]


def _expect(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


def decode_int(value: Any) -> int:
    """Return an integer of at most MAX_DIMENSION in magnitude."""
    _expect(type(value) is int and abs(value) <= MAX_DIMENSION, "expected an integer")
    return value


def decode_bool(value: Any) -> bool:
    """Return a Boolean."""
    _expect(type(value) is bool, "true or false is expected")
    return value


def decode_exponent(value: Any) -> int:
    """Return the exponent of `integer_pow`, at most 64 in magnitude."""
    _expect(type(value) is int and abs(value) <= 64, "expected an integer from -64 to 64")
    return value


def decode_bit_width(value: Any) -> int:
    """Return the number of random bits per element."""
    _expect(type(value) is int and value in (8, 16, 32), "8, 16 or 32 is expected")
    return value


def decode_fill_value(value: Any) -> Any:
    """Return the value that `gather` yields for indices outside the operand."""
    if type(value) is bool:
        return value
    return decode_int(value) if type(value) is int else _decode_real(value)


def decode_precision(value: Any) -> Any:
    """Return the precision of a dot product: None, one `lax.Precision`, or one per operand."""
    if type(value) is list:
        _expect(len(value) == 2, "expected two precisions")
        return tuple(decode_precision(item) for item in value)
    return None if value is None else member_of("Precision")(value)


def decode_contraction(value: Any) -> Any:
    """Return the dimension numbers of `dot_general`: (contracted, batch), each (lhs, rhs)."""
    decoded = sequence_of(sequence_of(decode_ints, 2), 2)(value)
    _expect(
        len(decoded) == 2 and all(len(axes) == 2 for axes in decoded),
        "expected dimension numbers",
    )
    return decoded


def decode_number(value: Any, dtype: np.dtype) -> np.generic:
    """Return the scalar of the given dtype; see `encode.encode_number` for the JSON form.

    Raises:
        ValueError: the value has the wrong type or is outside the range of an integer dtype.
    """
    if dtype.kind == "b":
        return dtype.type(decode_bool(value))
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        _expect(
            type(value) is int and bounds.min <= value <= bounds.max, "expected an integer in range"
        )
        return dtype.type(value)
    with np.errstate(over="ignore"):  # a value too large for the dtype becomes infinite
        if dtype.kind == "c":
            _expect(type(value) is list and len(value) == 2, "expected a complex number")
            return dtype.type(complex(*(_decode_real(part) for part in value)))
        return dtype.type(_decode_real(value))


def _decode_real(value: Any) -> float:
    if type(value) is str:
        _expect(value in ("nan", "inf", "-inf"), "expected a number")
        return float(value)
    _expect(type(value) in (int, float), "expected a number")
    return float(value)


# --- combinators -----------------------------------------------------------------------------


def sequence_of(decode_item: ParameterDecoder, max_length: int = 64) -> ParameterDecoder:
    """Return a decoder for a list of at most `max_length` items."""

    def decode(value: Any) -> tuple:
        _expect(type(value) is list and len(value) <= max_length, "expected a short list")
        return tuple(decode_item(item) for item in value)

    return decode


def optional(decode: ParameterDecoder) -> ParameterDecoder:
    """Return a decoder that also accepts null."""
    return lambda value: None if value is None else decode(value)


def key_of(table: Mapping[str, Any]) -> ParameterDecoder:
    """Return a decoder that looks names up in a table."""

    def decode(value: Any) -> Any:
        _expect(type(value) is str and value in table, "expected a known name")
        return table[value]

    return decode


def member_of(name: str) -> ParameterDecoder:
    """Return a decoder from member names of an enum in `jax.lax` to its members.

    If this JAX version has no such enum, the decoder accepts nothing.
    """
    return key_of({member.name: member for member in getattr(lax, name, ())})


def dimension_numbers(name: str) -> ParameterDecoder:
    """Return a decoder for a named tuple of integer tuples in `jax.lax`, if this version has it."""
    kind: Any = getattr(lax, name, None)

    def decode(value: Any) -> Any:
        _expect(
            kind is not None and type(value) is dict and set(value) == set(kind._fields),
            "expected dimension numbers",
        )
        return kind(**{name: decode_ints(axes) for name, axes in value.items()})

    return decode


decode_ints = sequence_of(decode_int)
decode_dtype = key_of(DTYPES)
decode_padding = sequence_of(sequence_of(decode_int, 3))
decode_key_impl = key_of({"threefry2x32": KEY_IMPL})
