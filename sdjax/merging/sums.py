"""Sums over a whole tensor, several in one pass.

XLA on a CPU gives every plain sum a loop of its own, which computes anew what is summed: the six
inner products of three task vectors read the weights six times. A reduction of several operands
is one loop, so runs of a row are summed that way, and the few numbers left by plain sums.

Axes: n sums; ... the tensor's own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

RUN = 16  # elements of a row that are summed one behind the other, as exactly as by a plain sum
_DEVICES = 8  # among which a row may be divided without a run being cut


def sums(terms: Sequence[jax.Array]) -> list[jax.Array]:
    """The sum of each term: float32 scalars.

    terms: float32, n of one shape. On a mesh of up to eight devices nothing but the scalars
    travels.
    """
    run = _run(terms[0].shape)
    if len(terms) > 1 and run > 1:
        terms = _reduced([term.reshape(*term.shape[:-1], -1, run) for term in terms], (-1,))
    return [jnp.sum(term) for term in terms]


def counts(masks: Sequence[jax.Array]) -> list[jax.Array]:
    """How many elements of each mask are true: int32 scalars.

    masks: Booleans of one shape. Whole numbers may be summed in any order, so that whole rows are
    runs here. A single mask is counted twice: XLA would store its plain sum's terms as integers.
    """
    ones = [mask.astype(jnp.int32) for mask in masks]
    if len(ones) == 1:
        ones *= 2
    inner = tuple(range(min(1, ones[0].ndim - 1), ones[0].ndim))
    return [jnp.sum(rows, dtype=jnp.int32) for rows in _reduced(ones, inner)[: len(masks)]]


def reproducible_sum(terms: Sequence[jax.Array]) -> jax.Array:
    """The elementwise sum of products such that it rounds alike wherever it is computed.

    Where a value sets a bound that is then compared with the value, both must be one number. XLA
    may compute it twice, and fuse a product with the addition behind it once and not the other
    time. Terms are cut to 22 bits of mantissa, which no addition is fused through.
    """
    return jnp.asarray(sum(jax.lax.reduce_precision(term, 8, 22) for term in terms))


def _reduced(terms: Sequence[jax.Array], axes: tuple[int, ...]) -> Sequence[jax.Array]:
    def add(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    axes = tuple(axis % terms[0].ndim for axis in axes)
    zeros = tuple(jnp.zeros((), term.dtype) for term in terms)
    return jax.lax.reduce(tuple(terms), zeros, add, axes)


def _run(shape: tuple[int, ...]) -> int:
    if not shape:
        return 1
    row = shape[-1]
    return math.gcd(row // _DEVICES if row % _DEVICES == 0 else row, RUN)
