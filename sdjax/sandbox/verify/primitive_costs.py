"""Cost of one application of each allowed primitive, calibrated by measurement.

The unit of cost is an elementwise operation such as a float32 product, per element. It takes about
2 ns of one thread: 0.5 ns within a fused chain, 3 ns where its result is stored. The table holds
what primitives take on their slowest operands, measured on 2026-11-26 (AMD EPYC, jax 0.10.2, the
compiler options of `sdjax run`) by `benchmarks/sandbox/primitive_costs.py`; the times are in
`benchmarks/sandbox/primitive_costs.md`. That script fails if the time per unit of a primitive in
one of its dtypes differs from the median by more than a factor of ten.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

CALL = 16  # units per equation, in addition to those of its elements
MATRIX_CALL = 200  # units per matrix of a factorization, in addition to those of its elements
# Units per element; one for primitives that are not listed. `_total` says which elements count.
UNITS = {
    name: units
    for units, names in {
        2: "nextafter one_minus_square scatter shift_right_arithmetic",
        4: """argmax argmin atan cbrt cos cosh erf exp exp2 expm1 integer_pow log log1p log2
            logistic rem rsqrt sin sinh sort sqrt tanh top_k""",
        8: "acos asin atan2 bessel_i0e bessel_i1e erfc pow tan",
        16: """acosh asinh atanh cumlogsumexp digamma erf_inv lgamma random_bits random_fold_in
            random_split threefry2x32""",
        32: "polygamma",  # in the gradient of digamma only
    }.items()
    for name in names.split()
}
# Units of primitives that take much more or less in one dtype than the other rules say.
EXCEPTIONS: Mapping[str, Mapping[str, float]] = {
    # A remainder is computed bit by bit: its time grows with the logarithm of the quotient.
    "rem": {"float32": 400, "bfloat16": 100, "float16": 40},
    "atanh": {"complex64": 32},
    "reduce_sum": {"float32": 1 / 8},
    "reduce_max": {"float32": 1 / 8, "bfloat16": 1 / 8, "float16": 1 / 8},
    "reduce_min": {"float32": 1 / 8, "bfloat16": 1 / 8, "float16": 1 / 8},
    "random_unwrap": {"key<fry>": 1 / 16},
    "random_wrap": {"uint32": 1 / 16},
}
# Units per product of a contraction, of dtypes for which there is a library.
PRODUCT_UNITS = {"float32": 1 / 32, "bfloat16": 1 / 8, "int32": 1 / 8, "complex64": 1 / 8}
# Units per step of a factorization, of which there are as many as elements times rows.
FACTORIZATIONS = dict.fromkeys(("cholesky", "lu", "triangular_solve"), 1 / 16)
FACTORIZATIONS |= {"qr": 1 / 4, "eigh": 1, "svd": 1}

Avals = Sequence[Any]


def primitive_cost(name: str, inputs: Avals, outputs: Avals, params: Mapping[str, Any]) -> int:
    """Return the cost of one application of a primitive.

    Args:
        name: name of the primitive.
        inputs: shapes and dtypes of the operands.
        outputs: shapes and dtypes of the results.
        params: parameters of the primitive.
    """
    return CALL + math.ceil(_total(name, inputs, outputs, params))


def units_per_element(name: str, inputs: Avals) -> float:
    """Return the units of an elementwise primitive, per element of its result."""
    dtype = str(inputs[0].dtype) if inputs else ""
    # Each operation on float16 converts it to float32 and back.
    usual = table_units(name, inputs) * (2 if dtype == "float16" else 1)
    return EXCEPTIONS.get(name.partition("-")[0], {}).get(dtype, usual)


def table_units(name: str, inputs: Avals) -> int:
    """Return the units per element according to the table, whatever the values are."""
    units = UNITS.get(name.partition("-")[0], 1)
    # Functions of complex numbers take several real ones.
    return units * _parts(inputs) ** (3 if units > 2 else 1)


def size(avals: Avals) -> int:
    """Return the total number of elements."""
    return sum(math.prod(aval.shape) for aval in avals)


def _total(name: str, inputs: Avals, outputs: Avals, params: Mapping[str, Any]) -> float:
    units, everything = units_per_element(name, inputs), size((*inputs, *outputs))
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        products = size(outputs) * math.prod(inputs[0].shape[axis] for axis in contracted)
        return everything * _parts(inputs) + products * PRODUCT_UNITS.get(str(inputs[0].dtype), 1)
    if name in FACTORIZATIONS:
        # A full basis is larger than its matrix.
        largest = max(math.prod(aval.shape) for aval in (*inputs, *outputs))
        steps = FACTORIZATIONS[name] * _parts(inputs) * min(inputs[0].shape[-2:]) * largest
        return MATRIX_CALL * math.prod(inputs[0].shape[:-2]) + everything + steps
    if name == "fft":
        return everything * max(1, _log2(math.prod(params["fft_lengths"])) // 2)
    if name.startswith(("cum", "sort", "top_k")):
        return size(inputs) * units * _log2(2 * params["k"] if name == "top_k" else size(inputs))
    of_inputs = name.startswith(("arg", "concatenate", "polynomial", "reduce", "scatter", "select"))
    return size(inputs if of_inputs else outputs) * units


def _parts(avals: Avals) -> int:
    """Return the number of real numbers per element."""
    return 2 if any(aval.dtype == "complex64" for aval in avals) else 1


def _log2(number: int) -> int:
    return max(1, math.ceil(math.log2(max(2, number))))
