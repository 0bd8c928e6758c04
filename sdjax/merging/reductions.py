"""Sums over a whole tensor, and its least and largest elements, several in one pass.

XLA on a CPU gives every plain sum a loop of its own, which computes anew what is summed: the six
inner products of three task vectors read the weights six times. A reduction of several operands
is one loop, so runs of a column are summed that way (rows are the lanes of a TPU, which would have
to be moved), and the few numbers left by plain sums.

Axes: n sums; ... the tensor's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Combine = Callable[[jax.Array, jax.Array], jax.Array]

MAX = 2**31 - 1
RUN = 8  # elements of a column that are summed one behind the other, as exactly as by a plain sum
_DEVICES = 8  # among which a column may be divided without a run being cut


def sums(terms: Sequence[jax.Array]) -> list[jax.Array]:
    """The sum of each term: float32 scalars.

    terms: float32, n of one shape. On a mesh of up to eight devices nothing but the scalars
    travels.
    """
    run = _run(terms[0].shape)
    if len(terms) > 1 and run > 1:
        *outer, rows, columns = terms[0].shape
        runs = [term.reshape(*outer, rows // run, run, columns) for term in terms]
        terms = _reduced(runs, (len(outer) + 1,), [(jax.lax.add, 0.0)] * len(runs))
    return [jnp.sum(term) for term in terms]


def counts(masks: Sequence[jax.Array]) -> list[jax.Array]:
    """How many elements of each mask are true: int32 scalars. masks: Booleans of one shape."""
    return list(survey([mask.astype(jnp.int32) for mask in masks])[0])


def survey(
    sums: Sequence[jax.Array], least: Sequence[jax.Array] = (), largest: Sequence[jax.Array] = ()
) -> tuple[Sequence[jax.Array], Sequence[jax.Array], Sequence[jax.Array]]:
    """Of some terms the sums, of others the least and of others the largest elements: int32
    scalars.

    sums, least, largest: int32 of one shape. Whole numbers may be taken in any order, so that whole
    rows are runs here, and on a mesh no more than a number a row travels.
    """
    terms = [*sums, *least, *largest]
    how = [(jax.lax.add, 0)] * len(sums) + [(jax.lax.min, MAX)] * len(least)
    how += [(jax.lax.max, -MAX)] * len(largest)
    inner = tuple(range(min(1, max(0, terms[0].ndim - 1)), terms[0].ndim))
    rows = _reduced(terms, inner, how)
    found = _reduced(rows, tuple(range(rows[0].ndim)), how)
    first, second = len(sums), len(sums) + len(least)
    return found[:first], found[first:second], found[second:]


def reproducible_sum(terms: Sequence[jax.Array]) -> jax.Array:
    """The elementwise sum of products such that it rounds alike wherever it is computed.

    Where a value sets a bound that is then compared with the value, both must be one number. XLA
    may compute it twice, and fuse a product with the addition behind it once and not the other
    time. Terms lose the last bit of their mantissa, which no addition is fused through.
    """
    return jnp.asarray(sum(_cut(term) for term in terms))


def _cut(term: jax.Array) -> jax.Array:
    bits = jax.lax.bitcast_convert_type(term.astype(jnp.float32), jnp.int32)
    return jax.lax.bitcast_convert_type(bits & -2, jnp.float32)


def _reduced(
    terms: Sequence[jax.Array], axes: tuple[int, ...], how: Sequence[tuple[Combine, float]]
) -> Sequence[jax.Array]:
    """how: how two elements are combined, and what leaves an element as it is, of each term."""

    def both(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(combine(x, y) for (combine, _), x, y in zip(how, a, b, strict=True))

    start = tuple(jnp.asarray(n, term.dtype) for (_, n), term in zip(how, terms, strict=True))
    return jax.lax.reduce(tuple(terms), start, both, axes)


def _run(shape: tuple[int, ...]) -> int:
    if len(shape) < 2:
        return 1
    rows = shape[-2]
    return math.gcd(rows // _DEVICES if rows % _DEVICES == 0 else rows, RUN)
