"""Selection by magnitude without sorting.

XLA sorts a few million float32 a second on a CPU and gathers the tensor to do it on a mesh;
counting how many elements reach a bound runs at the speed of memory, and little travels.
The bits of a non-negative float, read as an integer, order as the float does, so the k-th largest
magnitude is found among integers: a sorted sample of the tensor says where it roughly is, and each
pass counts at some places between the bounds, and moves the bounds to the elements next to them
(differences of bfloat16 numbers have few values, which many share), until a bound is reached by
exactly k elements or the bounds are neighbours. Where the sample misleads, the passes divide the
bits from the outside in (some ten of them); the result is exact in any case.

Axes: ... the tensor's own, n tensors, m bounds in each, p probes for a bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from sdjax.merging.reductions import survey

REGISTERS = 36  # numbers that one pass finds; with more, a pass takes longer than they save
SAMPLE = 2**12  # elements of a sample, about; no larger tensor is sorted

_NOTHING = 2**31 - 1  # a bound that no number reaches

Shares = Sequence[jax.Array | float]


def kth_largest_magnitudes(x: jax.Array, k: jax.Array) -> jax.Array:
    """The k-th largest |x| for each k, exactly: float32 [m], with k counted from 1.

    x: float32 of any shape, fewer than 2^31 elements. k: int32 [m], may be traced; for k <= 0 the
    result is infinite (nothing reaches it), for k > x.size it is 0. NaN counts as largest.
    """
    bits, k = _bits(x), jnp.asarray(k, jnp.int32)
    (bounds,) = _bounds([bits], k[None])
    exact = jnp.stack([jnp.min(jnp.where(bits >= bound, bits, _NOTHING)) for bound in bounds])
    magnitude = jax.lax.bitcast_convert_type(jnp.where(k > x.size, 0, exact), jnp.float32)
    return jnp.where(k <= 0, jnp.inf, magnitude)


def topk_masks(vectors: Sequence[jax.Array], density: Shares) -> list[jax.Array]:
    """Of each vector a mask of the floor(density * size) elements of largest magnitude.

    vectors: float32, n of one shape. At least one element is kept. Elements equal in magnitude to
    the last of them are kept too, as by the threshold of TIES' authors, so that the choice does not
    depend on their order; of small differences of bfloat16 numbers that can be many. A density of
    one or more keeps all, one of zero or less none. The product is rounded to 22 bits, and a share
    that float64 has a hair below a whole number counts as that number.
    """
    bits, shares = [_bits(vector) for vector in vectors], _stacked(density)
    counts = jnp.where(shares > 0, jnp.maximum(_share(shares, bits[0].size), 1), 0)  # [n]
    bounds = _bounds(bits, counts[:, None])
    return [
        (each >= bound) | (share >= 1)
        for each, (bound,), share in zip(bits, bounds, shares, strict=True)
    ]


def magnitude_band_masks(
    vectors: Sequence[jax.Array], density: Shares, gamma: Shares
) -> list[jax.Array]:
    """Of each vector a mask of the floor(density * size) elements behind the largest.

    Those are floor(gamma * size) elements, or fewer where fewer are left. Elements equal in
    magnitude to the smallest of those passed over are passed over too, and others that tie as in
    ``largest``; a density of one or more keeps all.
    """
    bits, shares = [_bits(vector) for vector in vectors], _stacked(density)
    size = bits[0].size
    kept = jnp.clip(_share(shares, size), 0, size)  # [n]
    passed = jnp.clip(_share(_stacked(gamma), size), 0, size - kept)
    bounds = _bounds(bits, jnp.stack([passed, passed + kept], axis=1))
    return [
        ((each < high) & (each >= low)) | (share >= 1)
        for each, (high, low), share in zip(bits, bounds, shares, strict=True)
    ]


def _share(share: jax.Array, size: int) -> jax.Array:
    # A share such as 0.7 lies a little below itself in float32; the floor must not feel that.
    count = jnp.floor(share * jnp.float32(size) * jnp.float32(1 + 2**-22))
    return jnp.minimum(count, jnp.float32(2**31 - 128)).astype(jnp.int32)


def _bits(x: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _stacked(shares: Shares) -> jax.Array:
    return jnp.stack([jnp.asarray(share, jnp.float32) for share in shares])


def _bounds(bits: Sequence[jax.Array], k: jax.Array) -> jax.Array:
    """int32 [n, m]: what the k[i, j] largest of ``bits[i]`` reach, and of the rest their equals."""
    size = bits[0].size
    if size <= SAMPLE:
        everything = jnp.stack([each.reshape(-1) for each in bits])
        return jnp.where(k <= 0, _NOTHING, _places(everything, k))
    sample = jnp.stack([_sample(each) for each in bits])
    share = jnp.clip(k.astype(jnp.float32) / size, 0.0, 1.0)
    expected = share * sample.shape[1]
    # Three deviations of the binomial, and one element for the ends.
    margin = 3.0 * jnp.sqrt(expected * (1.0 - share)) + 1.0
    ends = jnp.concatenate([jnp.floor(expected - margin), jnp.ceil(expected + margin)], axis=1)
    high, low = jnp.split(_places(sample, ends.astype(jnp.int32)), 2, axis=1)
    return _search(bits, k, low, high)


def _places(bits: jax.Array, k: jax.Array) -> jax.Array:
    """The k[i, j]-th largest of the few elements ``bits`` [n, s], k cut to 1 and s: int32 [n, m].

    A few thousand are sorted in less time than they are counted, and one sort compiles faster.
    """
    ordered = jax.lax.sort(bits, is_stable=False)
    size = bits.shape[1]
    return jnp.take_along_axis(ordered, size - jnp.clip(k, 1, size), axis=1)


def _search(bits: Sequence[jax.Array], k: jax.Array, low: jax.Array, high: jax.Array) -> jax.Array:
    """As _bounds, by counting; all in one loop, since each loop costs its compilation.

    low, high: where to count first: int32 [n, m].
    """

    # [low, high): k or more elements reach low, fewer reach high; `reached` counts those of low.
    def unsettled(state: tuple) -> jax.Array:
        low, high, reached, _ = state
        return jnp.any((high - low > 1) & (reached != k) & (k > 0))

    def narrow(state: tuple) -> tuple:
        low, high, reached, probes = state
        found, least, most = _survey(bits, probes)
        enough = found >= k[..., None]
        # Probes ascend, so counts descend: the highest probe with enough has the fewest.
        highest = jnp.max(jnp.where(enough, probes, -1), axis=-1)
        fewest = jnp.min(jnp.where(enough, found, _NOTHING), axis=-1)
        reached = jnp.where(highest > low, fewest, reached)
        low = jnp.maximum(low, highest)
        high = jnp.minimum(high, jnp.min(jnp.where(enough, _NOTHING, probes), axis=-1))
        # On to the next elements that there are: few values are differences of bfloat16.
        low = jnp.where(enough[..., 0], jnp.maximum(low, least), low)
        high = jnp.where(enough[..., -1], high, jnp.minimum(high, most + 1))
        return low, high, reached, _probes(low, high, probes.shape[-1])

    start = (jnp.zeros_like(k), jnp.full_like(k, _NOTHING), jnp.full_like(k, bits[0].size))
    low, *_ = jax.lax.while_loop(unsettled, narrow, (*start, _probes(low - 1, high + 1, _count(k))))
    return jnp.where(k <= 0, _NOTHING, low)


def _survey(bits: Sequence[jax.Array], probes: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """How many elements reach each probe [n, m, p]; the least that reaches the first [n, m]; the
    largest that does not reach the last [n, m].
    """
    places = [(each, row) for each, rows in zip(bits, probes, strict=True) for row in rows]
    at_once = max(1, REGISTERS // (probes.shape[-1] + 2))
    parts = [
        survey(
            [(each >= probe).astype(jnp.int32) for each, row in part for probe in row],
            [jnp.where(each >= row[0], each, _NOTHING) for each, row in part],
            [jnp.where(each < row[-1], each, -1) for each, row in part],
        )
        for part in (places[i : i + at_once] for i in range(0, len(places), at_once))
    ]
    reached, least, most = (
        jnp.stack([number for part in one for number in part]) for one in zip(*parts, strict=True)
    )
    shape = probes.shape[:2]
    return reached.reshape(probes.shape), least.reshape(shape), most.reshape(shape)


def _count(k: jax.Array) -> int:
    """How many probes a bound gets: with its two elements, what fits into one pass."""
    return min(max(REGISTERS // k.size - 2, 4), 8)


def _probes(low: jax.Array, high: jax.Array, count: int) -> jax.Array:
    """int32 [n, m, p], ascending, between the bounds: strictly, where they are not neighbours.

    The first and the last lie next to the bounds, since these are elements, which many may equal.
    """
    first, last = low + 1, high - 1
    place = jnp.arange(count, dtype=jnp.int32)
    width = jnp.maximum(last - first, 0)[..., None]
    step = jnp.maximum(jax.lax.div(width, count - 1), 1)
    between = first[..., None] + jnp.minimum(step * place, width)
    return jnp.where(place == count - 1, jnp.maximum(first, last)[..., None], between)


def _sample(bits: jax.Array) -> jax.Array:
    """Elements on a grid over the tensor, about SAMPLE of them: int32 [s]."""
    side = round(SAMPLE ** (1 / bits.ndim))  # places along each axis
    # An axis at a time: a TPU's compiler finds no room for the slice along two.
    for axis, size in enumerate(bits.shape):
        bits = jax.lax.slice_in_dim(bits, 0, size, math.ceil(size / side), axis)
    return bits.reshape(-1)
