"""The allow-list: every array primitive that may cross from the worker to the trusted parent.

Each entry says how many operands it takes, which parameters it has, how each of them is read from
JSON (encode.py writes them), what it costs, and how the parent binds it anew. A primitive that is
not here cannot be named by a message; a parameter that is not here is either fixed (`fixed`: the
worker refuses any other value, the parent supplies it itself) or ignored (`weak_type`, sharding
hints). Why a group is allowed stands above it. What is left out on purpose: callbacks, FFI and
custom calls (they leave the array world), collectives and shardings (the engine's business),
`unstack` (as many results as an axis is long), stateful RNGs (`rng_uniform`, `rng_bit_generator`:
they differ between platforms), `random_gamma` and `conv_general_dilated` (slow on a CPU and of no
use here).

Primitives come from `jax.extend.core.primitives` and `jax.lax`, both public.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.extend.core import primitives as extended

MAX_RANK = 8
MAX_DIMENSION = 1 << 40

_TYPES = "bool int8 int16 int32 uint8 uint16 uint32 float16 bfloat16 float32 complex64"
DTYPES: dict[str, np.dtype] = {name: jnp.dtype(name) for name in _TYPES.split(" ")}
KEY_IMPL = next(
    equation.params["impl"]
    for equation in jax.make_jaxpr(lambda: jax.random.key(0, impl="threefry2x32"))().eqns
    if equation.primitive.name == "random_seed"
)
KEY_DTYPE = jax.eval_shape(lambda: jax.random.key(0, impl="threefry2x32")).dtype


# --- parameters, read from JSON; each raises ValueError on what is not legal ------------------

Decode = Callable[[Any], Any]


def _expect(condition: bool, what: str) -> None:
    if not condition:
        raise ValueError(what)


def INT(value: Any) -> int:
    _expect(type(value) is int and abs(value) <= MAX_DIMENSION, "an integer is expected")
    return value


def BOOL(value: Any) -> bool:
    _expect(type(value) is bool, "true or false is expected")
    return value


def EXPONENT(value: Any) -> int:
    _expect(type(value) is int and abs(value) <= 64, "a small integer is expected")
    return value


def WIDTH(value: Any) -> int:
    _expect(type(value) is int and value in (8, 16, 32), "8, 16 or 32 is expected")
    return value


def _sequence(item: Decode, longest: int = 64) -> Decode:
    def decode(value: Any) -> tuple:
        _expect(type(value) is list and len(value) <= longest, "a short list is expected")
        return tuple(item(v) for v in value)

    return decode


def _optional(decode: Decode) -> Decode:
    return lambda value: None if value is None else decode(value)


def _lookup(table: Mapping[str, Any]) -> Decode:
    def decode(value: Any) -> Any:
        _expect(type(value) is str and value in table, "an unknown name")
        return table[value]

    return decode


def _members(kind: Any) -> Decode:
    return _lookup({m.name: m for m in kind})


def _numbers(kind: Any) -> Decode:
    """A named tuple of integer tuples (gather's and scatter's dimension numbers)."""

    def decode(value: Any) -> Any:
        _expect(type(value) is dict and set(value) == set(kind._fields), "dimension numbers")
        return kind(**{name: INTS(numbers) for name, numbers in value.items()})

    return decode


def decode_number(value: Any, dtype: np.dtype) -> np.generic:
    """The scalar of that type, or ValueError."""
    if dtype.kind == "b":
        return dtype.type(BOOL(value))
    if dtype.kind in "iu":
        bounds = np.iinfo(dtype)
        _expect(type(value) is int and bounds.min <= value <= bounds.max, "integer out of range")
        return dtype.type(value)
    with np.errstate(over="ignore"):  # what is too large for the type is infinite
        if dtype.kind == "c":
            _expect(type(value) is list and len(value) == 2, "a complex number is expected")
            return dtype.type(complex(*(_real(v) for v in value)))
        return dtype.type(_real(value))


def _real(value: Any) -> float:
    if type(value) is str:
        _expect(value in ("nan", "inf", "-inf"), "a number is expected")
        return float(value)
    _expect(type(value) in (int, float), "a number is expected")
    return float(value)


def FILL(value: Any) -> Any:
    return value if type(value) is bool else INT(value) if type(value) is int else _real(value)


def PRECISION(value: Any) -> Any:
    if type(value) is list:
        _expect(len(value) == 2, "two precisions are expected")
        return tuple(PRECISION(v) for v in value)
    return None if value is None else _members(lax.Precision)(value)


def CONTRACTION(value: Any) -> Any:
    decoded = _sequence(_sequence(INTS, 2), 2)(value)
    _expect(len(decoded) == 2 and all(len(d) == 2 for d in decoded), "dimension numbers expected")
    return decoded


INTS = _sequence(INT)
DTYPE = _lookup(DTYPES)
PADDING = _sequence(_sequence(INT, 3))
IMPL = _lookup({"threefry2x32": KEY_IMPL})
MODE = _members(lax.GatherScatterMode)
GATHER = _numbers(lax.GatherDimensionNumbers)
SCATTER = _numbers(lax.ScatterDimensionNumbers)
FFT = _members(lax.FftType)
ROUNDING = _members(lax.RoundingMethod)


# --- costs, in scalar operations -------------------------------------------------------------


def _size(avals: Any) -> int:
    return sum(math.prod(a.shape) for a in avals)


def each(weight: int) -> Callable[..., int]:
    return lambda ins, outs, params: weight * _size(outs)


def read(ins: Any, outs: Any, params: Any) -> int:
    return _size(ins)


def n_log_n(ins: Any, outs: Any, params: Any) -> int:
    size = _size(ins)
    return size * max(1, math.ceil(math.log2(max(2, size))))


def contraction(ins: Any, outs: Any, params: Any) -> int:
    (contracted, _), _ = params["dimension_numbers"]
    return 2 * _size(outs) * math.prod(ins[0].shape[axis] for axis in contracted)


def factorisation(ins: Any, outs: Any, params: Any) -> int:
    """About 20·m·n·min(m, n), LAPACK's order of magnitude for an SVD with vectors, of the largest
    of the matrices in and out (a full basis is larger than what it is of)."""
    return max(20 * math.prod(a.shape) * min(ins[0].shape[-2:] or (1,)) for a in (*ins, *outs))


# --- the list --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    arity: tuple[int, int]  # least and most operands
    bind: Callable[..., Any]
    params: Mapping[str, Decode] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    ignored: Mapping[str, Any] = field(default_factory=dict)
    cost: Callable[..., int] = field(default=each(1))


MANY = 256
# XLA makes some fifty operations of each of these, and ends itself on some ten thousand in a row:
# they count as five of the equations that a program may have.
LONG = frozenset(
    """integer_pow lgamma digamma erf_inv bessel_i0e bessel_i1e cumsum cumprod cummax cummin
    cumlogsumexp random_bits random_split random_fold_in threefry2x32""".split()  # noqa: SIM905
)
SORT = 20  # one of four operands takes the compiler some 50 ms, within a loop's body too
ALLOWED: dict[str, Entry] = {}


def weight(name: str) -> int:
    return 5 if name in LONG else SORT if name == "sort" else 1


def _allow(
    names: str,
    arity: int | tuple[int, int],
    cost: Callable[..., int] | None = None,
    fixed: Mapping[str, Any] | None = None,
    ignored: Mapping[str, Any] | None = None,
    bind: Callable[..., Any] | None = None,
    **params: Decode,
) -> None:
    for name in names.split():
        attribute = name.replace("-", "_") + "_p"
        primitive = getattr(extended, attribute, None) or getattr(lax, attribute, None)
        function = bind or primitive.bind  # type: ignore[union-attr]
        bounds = arity if isinstance(arity, tuple) else (arity, arity)
        ALLOWED[name] = Entry(bounds, function, params, fixed or {}, ignored or {}, cost or each(1))


def _wrap_key(data: Any, *, impl: Any) -> Any:
    return jax.random.wrap_key_data(data, impl="threefry2x32")


ACCURACY = {"accuracy": None}
SHARDING = {"sharding": None}

# Arithmetic, comparison and logic, element by element: what merge algorithms are made of.
_allow("neg sign floor ceil abs not is_finite square real imag conj", 1)
_allow("population_count clz", 1)
_allow("add sub div rem max min and or xor atan2 nextafter complex", 2)
_allow("eq ne lt le gt ge eq_to lt_to le_to", 2)
_allow("shift_left shift_right_logical shift_right_arithmetic", 2)
_allow("mul", 2, fixed={"out_dtype": None})
_allow("add_any", 2, bind=extended.add_jaxvals_p.bind)
_allow("clamp", 3)
_allow("select_n", (2, MANY))
_allow("round", 1, rounding_method=ROUNDING)
_allow("integer_pow", 1, each(8), y=EXPONENT)  # becomes a chain of products
_allow("reduce_precision", 1, exponent_bits=INT, mantissa_bits=INT)
_allow("convert_element_type", 1, ignored={"weak_type": False} | SHARDING, new_dtype=DTYPE)
_allow("bitcast_convert_type", 1, new_dtype=DTYPE)
# Smooth functions and the special functions of scores, gates, normal quantiles and entropies.
_allow("exp exp2 log log1p expm1 sin cos tan tanh logistic", 1, each(10), ACCURACY)
_allow("sqrt rsqrt cbrt", 1, each(4), ACCURACY)
_allow("asin acos atan sinh cosh asinh acosh atanh", 1, each(10))
_allow("erf erfc erf_inv lgamma digamma bessel_i0e bessel_i1e", 1, each(20))
_allow("pow", 2, each(20))
# Shapes: to see a tensor as rows, columns, blocks or a stack of experts.
_allow("broadcast_in_dim", 1, ignored=SHARDING, shape=INTS, broadcast_dimensions=INTS)
_allow("reshape", 1, fixed={"dimensions": None}, ignored=SHARDING, new_sizes=INTS)
_allow("iota", 0, ignored=SHARDING, dtype=DTYPE, shape=INTS, dimension=INT)
_allow("squeeze rev", 1, dimensions=INTS)
_allow("transpose", 1, permutation=INTS)
_allow("concatenate", (1, MANY), dimension=INT)
_allow("stack", (1, MANY), axis=INT)
_allow("tile", 1, reps=INTS)
_allow("pad", 2, padding_config=PADDING)
_allow("split", 1, sizes=INTS, axis=INT)
_allow("slice", 1, start_indices=INTS, limit_indices=INTS, strides=_optional(INTS))
_allow("dynamic_slice", (1, 1 + MAX_RANK), slice_sizes=INTS)
_allow("dynamic_update_slice", (2, 2 + MAX_RANK))
# Indexing by computed positions: take, ranks, per-row choices, `.at[…]` updates. XLA clamps or
# drops indices outside, whatever `mode` promises, so none of them reads or writes elsewhere.
_allow(
    "gather",
    2,
    dimension_numbers=GATHER,
    slice_sizes=INTS,
    unique_indices=BOOL,
    indices_are_sorted=BOOL,
    mode=MODE,
    fill_value=_optional(FILL),
)
for _name in ("scatter", "scatter_add", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max"):
    _allow(
        _name if _name == "scatter" else _name.replace("_", "-"),
        3,
        read,
        ignored={"update_jaxpr": None, "update_consts": ()},
        bind=getattr(lax, _name),  # the public function makes the update's jaxpr itself
        dimension_numbers=SCATTER,
        indices_are_sorted=BOOL,
        unique_indices=BOOL,
        mode=MODE,
    )
# Statistics over a tensor: norms, means, ranks, quantiles, thresholds, running sums.
_allow("reduce_sum", 1, read, ignored={"out_sharding": None}, axes=INTS)
_allow("reduce_max reduce_min", 1, read, ignored={"out_sharding": None}, axes=INTS)
_allow("reduce_prod reduce_and reduce_or reduce_xor", 1, read, axes=INTS)
_allow("argmax argmin", 1, read, axes=INTS, index_dtype=DTYPE)
_allow("cumsum cumprod cummax cummin cumlogsumexp", 1, n_log_n, axis=INT, reverse=BOOL)
_allow("sort", (1, 4), n_log_n, dimension=INT, is_stable=BOOL, num_keys=INT)
_allow("top_k", 1, n_log_n, k=INT, axis=INT)
# Linear algebra: similarities, projections, low-rank parts.
_allow(
    "dot_general",
    2,
    contraction,
    ignored={"out_sharding": None},
    dimension_numbers=CONTRACTION,
    precision=PRECISION,
    preferred_element_type=_optional(DTYPE),
)
_WHOLE = {"subset_by_index": None, "algorithm": None}
_allow("svd", 1, factorisation, _WHOLE, full_matrices=BOOL, compute_uv=BOOL)
_allow("eigh", 1, factorisation, _WHOLE, lower=BOOL, sort_eigenvalues=BOOL)
_allow("qr", 1, factorisation, {"pivoting": False, "use_magma": None}, full_matrices=BOOL)
_allow("cholesky lu", 1, factorisation)
_allow(
    "triangular_solve",
    2,
    factorisation,
    left_side=BOOL,
    lower=BOOL,
    transpose_a=BOOL,
    conjugate_a=BOOL,
    unit_diagonal=BOOL,
)
_allow("fft", 1, n_log_n, fft_type=FFT, fft_lengths=INTS)
# Random numbers from keys alone (threefry): the same on every platform.
_allow("random_seed", 1, impl=IMPL)
_allow("random_wrap", 1, bind=_wrap_key, impl=IMPL)
_allow("random_unwrap", 1, bind=jax.random.key_data)
_allow("random_bits", 1, each(100), bit_width=WIDTH, shape=INTS)
_allow("random_split", 1, each(100), shape=INTS)
_allow("random_fold_in", 2, each(100))
_allow("threefry2x32", 4, each(100))

# Control flow has array programs for parameters and is written out in encode.py and rebuild.py.
CONTROL_FLOW = ("scan", "while", "cond")
