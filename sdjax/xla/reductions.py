"""Sums, minima and maxima over a whole tensor, several in one pass.

On a CPU, XLA gives every plain sum its own loop and recomputes the summand in it: the six inner
products of three task vectors read the weights six times. A reduction with several operands is one
loop. Short runs within a column are reduced in this way (rows are the lanes of a TPU and would have
to be moved), and the few numbers that remain by plain sums.

Axes: n (terms), *shape (of a term).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, Shaped

Reducer = Callable[[jax.Array, jax.Array], jax.Array]

INT32_MAX = 2**31 - 1
RUN_LENGTH = 8  # elements of a column that are summed sequentially, as accurately as by `jnp.sum`
_MAX_DEVICES = 8  # along a column; more would split runs


def sums(terms: Sequence[Float32[Array, "*shape"]]) -> list[Float32[Array, ""]]:
    """Return the sum of each term, all of the same shape.

    On a mesh of up to eight devices only scalars are communicated.
    """
    run = _run_length(terms[0].shape)
    if len(terms) > 1 and run > 1:
        *outer, rows, columns = terms[0].shape
        runs = [term.reshape(*outer, rows // run, run, columns) for term in terms]
        terms = _sum_runs(runs, len(outer) + 1)
    return [jnp.sum(term) for term in terms]


def count_true(masks: Sequence[Bool[Array, "*shape"]]) -> list[Int32[Array, ""]]:
    """Return the number of true elements of each mask, all of the same shape."""
    return list(sum_min_max([mask.astype(jnp.int32) for mask in masks])[0])


def sum_min_max(
    sum_terms: Sequence[Int32[Array, "*shape"]],
    min_terms: Sequence[Int32[Array, "*shape"]] = (),
    max_terms: Sequence[Int32[Array, "*shape"]] = (),
) -> tuple[Sequence[Int32[Array, ""]], Sequence[Int32[Array, ""]], Sequence[Int32[Array, ""]]]:
    """Return the sums, minima and maxima of integer terms of the same shape, in one pass.

    The order of integer additions does not matter, so whole rows are runs here; on a mesh at most
    one number per row is communicated.
    """
    terms = [*sum_terms, *min_terms, *max_terms]
    reducers = [(jax.lax.add, 0)] * len(sum_terms) + [(jax.lax.min, INT32_MAX)] * len(min_terms)
    reducers += [(jax.lax.max, -INT32_MAX)] * len(max_terms)
    inner = tuple(range(min(1, max(0, terms[0].ndim - 1)), terms[0].ndim))
    rows = _reduce(terms, inner, reducers)
    results = _reduce(rows, tuple(range(rows[0].ndim)), reducers)
    first, second = len(sum_terms), len(sum_terms) + len(min_terms)
    return results[:first], results[first:second], results[second:]


def reproducible_sum(terms: Sequence[Float[Array, "*shape"]]) -> Float32[Array, "*shape"]:
    """Return the elementwise sum of products, rounded identically wherever it is computed.

    Needed if a value determines a bound that it is then compared with. XLA may compute the value
    twice and fuse a product with the following addition in only one of the two places. Clearing the
    last mantissa bit of every term prevents that fusion.
    """
    return jnp.asarray(sum(_clear_last_bit(term) for term in terms))


def _clear_last_bit(term: Float[Array, "*shape"]) -> Float32[Array, "*shape"]:
    bits = jax.lax.bitcast_convert_type(term.astype(jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type(bits & -2, jnp.float32)


def _reduce(
    terms: Sequence[Shaped[Array, "..."]],
    axes: tuple[int, ...],
    reducers: Sequence[tuple[Reducer, float]],
) -> Sequence[jax.Array]:
    """Reduce all terms in one pass.

    Args:
        terms: arrays of the same shape.
        axes: the axes to reduce.
        reducers: (binary function, neutral element) of each term.
    """

    def combine(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(reducer(x, y) for (reducer, _), x, y in zip(reducers, a, b, strict=True))

    start = tuple(
        jnp.asarray(neutral, term.dtype) for (_, neutral), term in zip(reducers, terms, strict=True)
    )
    return jax.lax.reduce(tuple(terms), start, combine, axes)


# JAX cannot differentiate a reduction of several operands if only some of them have a tangent.
@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _sum_runs(terms: list[jax.Array], axis: int) -> list[jax.Array]:
    """Return the sum of each term over an axis, in one pass."""
    return list(_reduce(terms, (axis,), [(jax.lax.add, 0.0)] * len(terms)))


@_sum_runs.defjvp
def _sum_runs_jvp(
    axis: int, primals: tuple[list[jax.Array]], tangents: tuple[list[jax.Array]]
) -> tuple[list[jax.Array], list[jax.Array]]:
    (terms,), (changes,) = primals, tangents
    return _sum_runs(terms, axis), [jnp.sum(change, axis) for change in changes]


def _run_length(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return 1
    rows = shape[-2]
    return math.gcd(rows // _MAX_DEVICES if rows % _MAX_DEVICES == 0 else rows, RUN_LENGTH)
