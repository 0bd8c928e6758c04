"""Sums over a whole tensor, and its least and largest elements, several in one pass.

XLA on a CPU gives every plain sum a loop of its own, which computes anew what is summed: the six
inner products of three task vectors read the weights six times. A reduction of several operands
is one loop, so runs of a row are summed that way, and the few numbers left by plain sums.

Axes: n sums; ... the tensor's own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp

Combine = Callable[[jax.Array, jax.Array], jax.Array]

RUN = 16  # elements of a row that are summed one behind the other, as exactly as by a plain sum
_DEVICES = 8  # among which a row may be divided without a run being cut


def sums(terms: Sequence[jax.Array]) -> list[jax.Array]:
    """The sum of each term: float32 scalars.

    terms: float32, n of one shape. On a mesh of up to eight devices nothing but the scalars
    travels.
    """
    run = _run(terms[0].shape)
    if len(terms) > 1 and run > 1:
        runs = [term.reshape(*term.shape[:-1], -1, run) for term in terms]
        terms = _reduced(runs, (terms[0].ndim,), [jax.lax.add] * len(runs), [0.0] * len(runs))
    return [jnp.sum(term) for term in terms]


def counts(masks: Sequence[jax.Array]) -> list[jax.Array]:
    """How many elements of each mask are true: int32 scalars. masks: Booleans of one shape.

    A single mask is counted twice: XLA would store its plain sum's terms as integers.
    """
    twice = [*masks, masks[0]] if len(masks) == 1 else masks
    found = integer_reductions([(mask.astype(jnp.int32), jax.lax.add, 0) for mask in twice])
    return found[: len(masks)]


def integer_reductions(terms: Sequence[tuple[jax.Array, Combine, int]]) -> list[jax.Array]:
    """Of each term, with how two elements are combined and what leaves an element as it is, an
    int32 scalar.

    terms: int32 of one shape. Whole numbers may be combined in any order, so that whole rows are
    runs here.
    """
    arrays, combine, neutral = zip(*terms, strict=True)
    inner = tuple(range(min(1, arrays[0].ndim - 1), arrays[0].ndim))
    rows = _reduced(arrays, inner, combine, neutral)
    return list(_reduced(rows, tuple(range(rows[0].ndim)), combine, neutral))


def reproducible_sum(terms: Sequence[jax.Array]) -> jax.Array:
    """The elementwise sum of products such that it rounds alike wherever it is computed.

    Where a value sets a bound that is then compared with the value, both must be one number. XLA
    may compute it twice, and fuse a product with the addition behind it once and not the other
    time. Terms are cut to 22 bits of mantissa, which no addition is fused through.
    """
    return jnp.asarray(sum(jax.lax.reduce_precision(term, 8, 22) for term in terms))


def _reduced(
    terms: Sequence[jax.Array],
    axes: tuple[int, ...],
    combine: Sequence[Combine],
    neutral: Sequence[float],
) -> Sequence[jax.Array]:
    def both(a: Sequence[jax.Array], b: Sequence[jax.Array]) -> tuple[jax.Array, ...]:
        return tuple(one(x, y) for one, x, y in zip(combine, a, b, strict=True))

    start = tuple(jnp.asarray(n, term.dtype) for n, term in zip(neutral, terms, strict=True))
    return jax.lax.reduce(tuple(terms), start, both, axes)


def _run(shape: tuple[int, ...]) -> int:
    if not shape:
        return 1
    row = shape[-1]
    return math.gcd(row // _DEVICES if row % _DEVICES == 0 else row, RUN)
