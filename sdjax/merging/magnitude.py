"""Selection by magnitude without sorting.

XLA sorts a few million float32 a second on a CPU and gathers the tensor to do it on a mesh;
counting how many elements reach a bound runs at the speed of memory and needs one small all-reduce.
The bits of a non-negative float, read as an integer, order as the float does, so the k-th largest
magnitude is found among integers: a sample of the tensor says where it roughly is, and each further
pass counts at ``PROBES`` places between the bounds, until a bound is reached by exactly k elements
or the bounds are neighbours. Where the sample misleads, the passes bisect the bits from the outside
in (some ten of them); the result is exact in any case.

Axes: ... the tensor's own, m bounds looked for at once, p probes of each.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

PROBES = 8
SAMPLED_ABOVE = 2**16  # smaller tensors are searched without a sample
SAMPLE = 2**12  # elements of a sample, at most

_NOTHING = 2**31 - 1  # a bound that no number reaches


def kth_magnitude(x: jax.Array, k: jax.Array | int) -> jax.Array:
    """The k-th largest |x|, exactly: float32 scalar, with k counted from 1.

    x: float32 of any shape, fewer than 2^31 elements. k: int32 scalar, may be traced; for k <= 0
    the result is infinite (nothing reaches it), for k > x.size it is 0. NaN counts as largest.
    """
    bits, k = _bits(x), jnp.asarray(k, jnp.int32)
    (bound,) = _bounds(bits, k[None])
    exact = jnp.min(jnp.where(bits >= bound, bits, _NOTHING))
    magnitude = jax.lax.bitcast_convert_type(jnp.where(k > x.size, 0, exact), jnp.float32)
    return jnp.where(k <= 0, jnp.inf, magnitude)


def largest(x: jax.Array, density: jax.Array | float) -> jax.Array:
    """Boolean mask of the floor(density * size) elements of largest magnitude, at least one.

    Elements equal in magnitude to the last of them are kept too, so that the choice does not depend
    on their order; a density of one or more keeps all, one of zero or less none.
    """
    bits, density = _bits(x), jnp.asarray(density, jnp.float32)
    count = jnp.where(density > 0, jnp.maximum(_share(density, x.size), 1), 0)
    (bound,) = _bounds(bits, count[None])
    return (bits >= bound) | (density >= 1)


def below_largest(x: jax.Array, density: jax.Array | float, gamma: jax.Array | float) -> jax.Array:
    """Boolean mask of floor(density * size) elements below the floor(gamma * size) largest.

    Where fewer elements are left, fewer of the largest are passed over. Elements equal in magnitude
    to the smallest of those passed over are passed over too, and others that tie as in ``largest``;
    a density of one or more keeps all.
    """
    bits, density = _bits(x), jnp.asarray(density, jnp.float32)
    kept = jnp.clip(_share(density, x.size), 0, x.size)
    passed = jnp.clip(_share(jnp.asarray(gamma, jnp.float32), x.size), 0, x.size - kept)
    above, low = _bounds(bits, jnp.stack([passed, passed + kept]))
    return ((bits < above) & (bits >= low)) | (density >= 1)


def count_each(masks: Sequence[jax.Array]) -> list[jax.Array]:
    """How many elements of each mask are true, in one pass: int32 scalars.

    masks: Booleans of one shape. A plain sum of a mask is rewritten by XLA on a CPU so that the
    mask is first stored as integers; a reduction of several operands is not, and reads what the
    masks are computed from once for all of them. Rows are counted first, side by side.
    """
    ones = [mask.astype(jnp.int32) for mask in masks]
    if len(ones) == 1:
        ones *= 2
    inner = tuple(range(min(1, ones[0].ndim - 1), ones[0].ndim))
    by_row = jax.lax.reduce(
        tuple(ones),
        (jnp.int32(0),) * len(ones),
        lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True)),
        inner,
    )
    return [jnp.sum(rows, dtype=jnp.int32) for rows in by_row[: len(masks)]]


def reproducible_sum(terms: Sequence[jax.Array]) -> jax.Array:
    """The sum of products such that it rounds alike wherever it is computed.

    Where a value sets a bound that is then compared with the value, both must be one number. XLA
    may compute it twice, and fuse a product with the addition behind it once and not the other
    time. Terms are cut to 22 bits of mantissa, which no addition is fused through.
    """
    return jnp.asarray(sum(jax.lax.reduce_precision(term, 8, 22) for term in terms))


def _share(share: jax.Array, size: int) -> jax.Array:
    # A share such as 0.7 lies a little below itself in float32; the floor must not feel that.
    count = jnp.floor(share * jnp.float32(size) * jnp.float32(1 + 2**-22))
    return jnp.minimum(count, jnp.float32(2**31 - 128)).astype(jnp.int32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _bounds(bits: jax.Array, k: jax.Array) -> jax.Array:
    """int32 [m], for each of k [m]: what the k largest of ``bits`` reach, and else their equals."""
    if bits.size > SAMPLED_ABOVE:
        first = _sampled_probes(bits, k)
    else:
        first = _probes(jnp.zeros_like(k), jnp.full_like(k, _NOTHING))

    # [low, high): k or more elements reach low, fewer reach high; `reached` counts those of low.
    def unsettled(state: tuple) -> jax.Array:
        low, high, reached, _ = state
        return jnp.any((high - low > 1) & (reached != k) & (k > 0))

    def narrow(state: tuple) -> tuple:
        low, high, reached, probes = state
        counts = jnp.stack(count_each([bits >= probe for probe in probes.reshape(-1)]))
        counts = counts.reshape(probes.shape)  # [m, p]
        enough = counts >= k[:, None]
        # Probes ascend, so counts descend: the highest probe with enough has the fewest.
        highest = jnp.max(jnp.where(enough, probes, -1), axis=1)
        fewest = jnp.min(jnp.where(enough, counts, _NOTHING), axis=1)
        reached = jnp.where(highest > low, fewest, reached)
        low = jnp.maximum(low, highest)
        high = jnp.minimum(high, jnp.min(jnp.where(enough, _NOTHING, probes), axis=1))
        return low, high, reached, _probes(low, high)

    start = (jnp.zeros_like(k), jnp.full_like(k, _NOTHING), jnp.full_like(k, bits.size), first)
    low, *_ = jax.lax.while_loop(unsettled, narrow, start)
    return jnp.where(k <= 0, _NOTHING, low)


def _probes(low: jax.Array, high: jax.Array) -> jax.Array:
    """int32 [m, p], ascending, between the bounds: strictly, where they are two or more apart."""
    width = (high - low)[:, None]
    step = jnp.maximum(width // (PROBES + 1), 1)
    return low[:, None] + jnp.minimum(step * jnp.arange(1, PROBES + 1, dtype=jnp.int32), width - 1)


def _sampled_probes(bits: jax.Array, k: jax.Array) -> jax.Array:
    """int32 [m, p]: probes over the intervals in which a sample expects the k-th elements."""
    side = round(SAMPLE ** (1 / bits.ndim))  # places along each axis
    sample = bits[tuple(slice(None, None, math.ceil(n / side)) for n in bits.shape)]
    share = jnp.clip(k.astype(jnp.float32) / bits.size, 0.0, 1.0)
    expected = share * sample.size
    # Three deviations of the binomial, and one element for the ends.
    margin = 3.0 * jnp.sqrt(expected * (1.0 - share)) + 1.0
    ends = [jnp.floor(expected - margin), jnp.ceil(expected + margin)]
    high, low = jnp.split(_bounds(sample, jnp.concatenate(ends).astype(jnp.int32)), 2)
    place = jnp.arange(PROBES, dtype=jnp.int32)
    step = jnp.maximum(high - low, 0) // (PROBES - 1)
    return jnp.where(place == PROBES - 1, high[:, None], low[:, None] + step[:, None] * place)
