"""Allow-list of the array primitives that the parent accepts from a worker.

Each entry lists the number of operands, the parameters and their decoders (encode.py writes them),
how the parent binds the primitive, and the JAX versions that have it. A message cannot
name a primitive that is not listed. A parameter that is not listed is either `fixed` (the worker
refuses any other value) or ignored (`weak_type`, sharding hints); the parent supplies both itself.
The comment above each group says why it is allowed.

Deliberately excluded: callbacks, FFI and custom calls (they run code outside the array program),
collectives and shardings (left to the merge engine), stateful generators (`rng_uniform`,
`rng_bit_generator`: they differ between platforms), `random_gamma` and `conv_general_dilated` (slow
on a CPU and not useful here).

One list serves all supported JAX versions. An operation that is a primitive only in newer versions
carries its version in `since` and a `fallback` made of older operations, so that older versions can
verify stored programs from newer ones. encode.py rewrites `unstack`, reduce, scan, while and cond
to forms of our own, which do not depend on JAX's parameters. A primitive that is missing from the
running JAX version and has no fallback is refused by name; it never prevents the sandbox from
starting.

Primitives come from `jax.extend.core.primitives` and `jax.lax`, both public.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
from jax import lax
from jax.extend.core import primitives as jax_primitives

from sdjax.sandbox.ir.parameters import (
    MAX_RANK,
    ParameterDecoder,
    decode_bit_width,
    decode_bool,
    decode_contraction,
    decode_dtype,
    decode_exponent,
    decode_fill_value,
    decode_int,
    decode_ints,
    decode_key_impl,
    decode_padding,
    decode_precision,
    dimension_numbers,
    key_of,
    member_of,
    optional,
    sequence_of,
)

OLDEST = "0.10.2"  # the oldest JAX that sdjax supports


@dataclass(frozen=True)
class AllowedPrimitive:
    """One primitive of the allow-list.

    Attributes:
        arity: minimum and maximum number of operands.
        bind: applies the primitive to operands and decoded parameters; None if this JAX version
            cannot express it.
        native: whether this JAX version has the operation, rather than only its fallback.
        params: the parameters in the IR, with their decoders.
        fixed: the only legal value of each parameter that is not in the IR.
        since: the first JAX version with this primitive.
        fallback: the same function in older operations, for JAX versions that lack the primitive.
    """

    arity: tuple[int, int]
    bind: Callable[..., Any] | None
    native: bool = True
    params: Mapping[str, ParameterDecoder] = field(default_factory=dict)
    fixed: Mapping[str, Any] = field(default_factory=dict)
    since: str = OLDEST
    fallback: Callable[..., Any] | None = None


ALLOWED: dict[str, AllowedPrimitive] = {}
CONTROL_FLOW = ("scan", "while", "cond")  # encoded in the IR's own form

# XLA expands each of these to about fifty operations, and aborts on about ten thousand in a row.
_EXPANDED = frozenset(
    """integer_pow lgamma digamma erf_inv bessel_i0e bessel_i1e cumsum cumprod cummax cummin
    cumlogsumexp random_bits random_split random_fold_in threefry2x32 polynomial""".split()  # noqa: SIM905
)
_EXPANDED_WEIGHT = 5
_SORT_WEIGHT = 20  # the compiler takes about 50 ms per sort of four operands, even inside a loop
_MANY = 256
_ATTRIBUTES = {"add_any": "add_jaxvals"}  # primitives whose attribute in JAX has another name


def weight(name: str) -> int:
    """Return how much an equation counts toward `Limits.equations`."""
    if name == "sort":
        return _SORT_WEIGHT
    return _EXPANDED_WEIGHT if name in _EXPANDED else 1


def find_primitive(name: str) -> Any | None:
    """Return JAX's public primitive of that name, or None if this version has none."""
    attribute = _ATTRIBUTES.get(name, name.replace("-", "_")) + "_p"
    return getattr(jax_primitives, attribute, None) or getattr(lax, attribute, None)


def _allow(
    names: str,
    arity: int | tuple[int, int],
    *,
    fixed: Mapping[str, Any] | None = None,
    supplied: Mapping[str, Any] | None = None,
    bind: Callable[..., Any] | str | None = None,
    fallback: Callable[..., Any] | None = None,
    since: str = OLDEST,
    **params: ParameterDecoder,
) -> None:
    """Add primitives to the list.

    Args:
        names: names separated by spaces.
        arity: number of operands, or (minimum, maximum).
        fixed: parameters with a single legal value. The primitive is bound with them.
        supplied: parameters that the worker ignores. The primitive is bound with them.
        bind: a function to call in place of the primitive, or its name in `jax.lax`. It sets
            `fixed` itself.
        fallback: a function for JAX versions that lack the primitive.
        since: the first JAX version with the primitive.
        **params: the parameters in the IR.
    """
    constants = {**(fixed or {}), **(supplied or {})}
    for name in names.split():
        function = getattr(lax, bind, None) if isinstance(bind, str) else bind
        if bind is None and (primitive := find_primitive(name)) is not None:
            function = functools.partial(primitive.bind, **constants)
        ALLOWED[name] = AllowedPrimitive(
            arity=arity if isinstance(arity, tuple) else (arity, arity),
            bind=function or fallback,
            native=function is not None,
            params=params,
            fixed=fixed or {},
            since=since,
            fallback=fallback,
        )


def _wrap_key(data: Any, *, impl: Any) -> Any:
    return jax.random.wrap_key_data(data, impl="threefry2x32")


def _evaluate_polynomial(x: Any, *coefficients: Any) -> Any:
    """Evaluate a polynomial by Horner's rule, coefficients from the constant term up."""
    result = coefficients[-1]
    for coefficient in reversed(coefficients[:-1]):
        result = result * x + coefficient
    return result


def _reduce(*operands: Any, axes: Any, reducers: Sequence[Any]) -> Any:
    """Reduce several arrays of one shape in one pass; their initial values follow them."""

    def combine(a: Sequence[Any], b: Sequence[Any]) -> tuple:
        return tuple(getattr(lax, f)(x, y) for f, x, y in zip(reducers, a, b, strict=True))

    return lax.reduce(operands[: len(reducers)], operands[len(reducers) :], combine, axes)


_decode_reducers = sequence_of(key_of({name: name for name in ("add", "min", "max")}), 128)
_DEFAULT_ACCURACY = {"accuracy": None}
_NO_SHARDING = {"sharding": None}
_NO_OUT_SHARDING = {"out_sharding": None}

# Arithmetic, comparison and logic, elementwise: the bulk of merge algorithms.
_allow("neg sign floor ceil abs not is_finite square real imag", 1)
_allow("conj", 1, bind="conj")  # its derivative needs the dtype of its operand
_allow("population_count clz", 1)
_allow("add add_any sub div rem max min and or xor atan2 nextafter complex", 2)
_allow("eq ne lt le gt ge eq_to lt_to le_to", 2)
_allow("shift_left shift_right_logical shift_right_arithmetic", 2)
_allow("mul", 2, fixed={"out_dtype": None})
_allow("clamp", 3)
_allow("select_n", (2, _MANY))
_allow("round", 1, rounding_method=member_of("RoundingMethod"))
_allow("integer_pow", 1, y=decode_exponent)  # becomes a chain of products
_allow("reduce_precision", 1, exponent_bits=decode_int, mantissa_bits=decode_int)
_allow(
    "convert_element_type", 1, supplied={"weak_type": False} | _NO_SHARDING, new_dtype=decode_dtype
)
_allow("bitcast_convert_type", 1, new_dtype=decode_dtype)
# The derivative of tanh and of the inverse functions; (1 + x)(1 - x) is exact near one.
_allow("one_minus_square", 1, since="0.12", fallback=lambda x: (1 + x) * (1 - x))
# Smooth functions and the special functions of scores, gates, normal quantiles and entropies.
_allow(
    "exp exp2 log log1p expm1 sin cos tan tanh logistic",
    1,
    fixed=_DEFAULT_ACCURACY,
)
_allow(
    "log2",
    1,
    fixed=_DEFAULT_ACCURACY,
    since="0.12",
    fallback=lambda x: lax.log(x) / math.log(2),
)
_allow("sqrt rsqrt cbrt", 1, fixed=_DEFAULT_ACCURACY)
_allow("asin acos atan sinh cosh asinh acosh atanh", 1)
_allow("erf erf_inv lgamma digamma bessel_i0e bessel_i1e", 1)
_allow("erfc", 1, fixed=_DEFAULT_ACCURACY, bind="erfc")  # no accuracy in 0.10
_allow("pow", 2)
_allow("polynomial", (2, _MANY), since="0.12", fallback=_evaluate_polynomial)
# Shapes: view a tensor as rows, columns, blocks or a stack of experts.
_allow(
    "broadcast_in_dim",
    1,
    supplied=_NO_SHARDING,
    shape=decode_ints,
    broadcast_dimensions=decode_ints,
)
_allow("reshape", 1, fixed={"dimensions": None}, supplied=_NO_SHARDING, new_sizes=decode_ints)
_allow(
    "iota", 0, supplied=_NO_SHARDING, dtype=decode_dtype, shape=decode_ints, dimension=decode_int
)
_allow("squeeze rev", 1, dimensions=decode_ints)
_allow("transpose", 1, permutation=decode_ints)
_allow("concatenate", (1, _MANY), dimension=decode_int)
_allow("stack", (1, _MANY), axis=decode_int)
_allow("tile", 1, reps=decode_ints)
_allow("pad", 2, padding_config=decode_padding)
_allow("split", 1, sizes=decode_ints, axis=decode_int)
_allow(
    "slice", 1, start_indices=decode_ints, limit_indices=decode_ints, strides=optional(decode_ints)
)
_allow("dynamic_slice", (1, 1 + MAX_RANK), slice_sizes=decode_ints)
_allow("dynamic_update_slice", (2, 2 + MAX_RANK))
# Indexing by computed positions: take, ranks, per-row choices, `.at[…]` updates. Whatever `mode`
# promises, XLA clamps or drops indices outside the operand, so nothing else is read or written.
_allow(
    "gather",
    2,
    dimension_numbers=dimension_numbers("GatherDimensionNumbers"),
    slice_sizes=decode_ints,
    unique_indices=decode_bool,
    indices_are_sorted=decode_bool,
    mode=member_of("GatherScatterMode"),
    fill_value=optional(decode_fill_value),
)
for _name in ("scatter", "scatter_add", "scatter_sub", "scatter_mul", "scatter_min", "scatter_max"):
    _allow(
        _name if _name == "scatter" else _name.replace("_", "-"),
        3,
        bind=_name,  # the public function builds the jaxpr of the update itself
        dimension_numbers=dimension_numbers("ScatterDimensionNumbers"),
        indices_are_sorted=decode_bool,
        unique_indices=decode_bool,
        mode=member_of("GatherScatterMode"),
    )
# Statistics over a tensor: norms, means, ranks, quantiles, thresholds, running sums.
_allow("reduce_sum", 1, supplied=_NO_OUT_SHARDING, axes=decode_ints)
for _name in ("reduce_max", "reduce_min"):
    _allow(_name, 1, bind=_name, axes=decode_ints)  # no out_sharding in 0.10
_allow("reduce_prod reduce_and reduce_or reduce_xor", 1, axes=decode_ints)
_allow("reduce", (2, 256), bind=_reduce, axes=decode_ints, reducers=_decode_reducers)
_allow("argmax argmin", 1, axes=decode_ints, index_dtype=decode_dtype)
_allow("cumsum cumprod cummax cummin cumlogsumexp", 1, axis=decode_int, reverse=decode_bool)
_allow("sort", (1, 4), dimension=decode_int, is_stable=decode_bool, num_keys=decode_int)
# JAX before 0.12 has no `is_stable` here and keeps the order of equal elements.
_allow("top_k", 1, fixed={"is_stable": True}, bind="top_k", k=decode_int, axis=decode_int)
# Linear algebra: similarities, projections, low-rank parts.
_allow(
    "dot_general",
    2,
    supplied=_NO_OUT_SHARDING,
    dimension_numbers=decode_contraction,
    precision=decode_precision,
    preferred_element_type=optional(decode_dtype),
)
_SPECTRUM = {"subset_by_index": None, "algorithm": None}
_allow("svd", 1, fixed=_SPECTRUM, full_matrices=decode_bool, compute_uv=decode_bool)
_allow("eigh", 1, fixed=_SPECTRUM, lower=decode_bool, sort_eigenvalues=decode_bool)
_allow("qr", 1, fixed={"pivoting": False, "use_magma": None}, full_matrices=decode_bool)
_allow("cholesky lu", 1)
_allow(
    "triangular_solve",
    2,
    left_side=decode_bool,
    lower=decode_bool,
    transpose_a=decode_bool,
    conjugate_a=decode_bool,
    unit_diagonal=decode_bool,
)
_allow("fft", 1, fft_type=member_of("FftType"), fft_lengths=decode_ints)
# Random numbers from keys alone (threefry): the same on every platform.
_allow("random_seed", 1, impl=decode_key_impl)
_allow("random_wrap", 1, bind=_wrap_key, impl=decode_key_impl)
_allow("random_unwrap", 1, bind=lambda keys: jax.random.key_data(keys))
_allow("random_bits", 1, bit_width=decode_bit_width, shape=decode_ints)
_allow("random_split", 1, shape=decode_ints)
_allow("random_fold_in", 2)
_allow("threefry2x32", 4)
