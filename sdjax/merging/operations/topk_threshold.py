"""Selection by magnitude without sorting the tensor.

On a CPU, XLA sorts a few million float32 per second, and on a mesh it gathers the tensor to do so.
Counting how many elements reach a bound runs at memory speed and communicates little.

The bits of a non-negative float, read as an integer, have the same order as the floats, so the k-th
largest magnitude is found among integers. A sorted sample of the tensor provides an initial
interval. Each pass counts at several probes inside the interval and then moves its bounds to the
elements next to them (differences of bfloat16 numbers take few values, which many elements share),
until exactly k elements reach a bound or the interval is empty. If the sample is misleading, about
ten passes narrow the full range of bits. The result is always exact.

Of the elements that tie with the k-th largest, those with the largest hash of their index are kept,
so that there are exactly k. That is as arbitrary as the order of a sort, but it depends neither on
the order of execution nor on the mesh, and it favors no rows. The bound of the hashes is found in
the same way, in further passes over the tensors that have such ties.

Axes: *shape (of the tensor), n (tensors), m (bounds per tensor), p (probes per bound), s (samples).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32, UInt32

from sdjax.core.integer_hash import flat_index
from sdjax.xla.reductions import sum_min_max

RESULTS_PER_PASS = 36  # with more, a pass costs more time than it saves
SAMPLE_SIZE = 2**12  # approximate; tensors up to this size are sorted instead

_UNREACHED = 2**31 - 1  # a bound that no element reaches
_ALL_TIES = -1  # a bound that all elements reach

Fractions = Sequence[Float[Array, ""] | float]


def kth_largest_magnitudes(
    x: Float[Array, "*shape"], k: Int32[Array, " m"]
) -> Float32[Array, " m"]:
    """Return the k-th largest |x| for each k, counted from 1, exactly.

    Args:
        x: fewer than 2^31 elements; NaN counts as the largest.
        k: may be traced. The result is infinite for k <= 0 and zero for k > x.size.
    """
    bits, k = _magnitude_bits(x), jnp.asarray(k, jnp.int32)
    (bounds,) = _find_bounds([bits], k[None], keep_ties=True).value
    exact = jnp.stack([jnp.min(jnp.where(bits >= bound, bits, _UNREACHED)) for bound in bounds])
    magnitude = jax.lax.bitcast_convert_type(jnp.where(k > x.size, 0, exact), jnp.float32)
    return jnp.where(k <= 0, jnp.inf, magnitude)


def topk_masks(
    vectors: Sequence[Float[Array, "*shape"]], density: Fractions, *, keep_ties: bool = False
) -> list[Bool[Array, "*shape"]]:
    """Return masks of the floor(density * size) elements of largest magnitude.

    At least one element is kept. The product is rounded to 22 bits, so that a density that is
    slightly too small in float32 gives the same count as in float64.

    Args:
        vectors: n tensors of the same shape.
        density: fraction to keep, per tensor: 1 or more keeps everything, 0 or less nothing.
        keep_ties: keep all elements that tie with the smallest one kept, as the reference code of
            TIES does. For small differences of bfloat16 numbers these can be many.
    """
    bits, fractions = [_magnitude_bits(vector) for vector in vectors], _stack(density)
    counts = _count(fractions, bits[0].size)  # [n]
    counts = jnp.where(fractions > 0, jnp.maximum(counts, 1), 0)
    masks = _largest_masks(bits, counts[:, None], keep_ties)
    return [mask | (fraction >= 1) for (mask,), fraction in zip(masks, fractions, strict=True)]


def magnitude_band_masks(
    vectors: Sequence[Float[Array, "*shape"]],
    density: Fractions,
    gamma: Fractions,
    *,
    keep_ties: bool = False,
) -> list[Bool[Array, "*shape"]]:
    """Return masks of the floor(density * size) largest elements after skipping outliers.

    The outliers are the floor(gamma * size) largest elements, or fewer if not enough would remain.

    Args:
        vectors: n tensors of the same shape.
        density: fraction to keep, per tensor; 1 or more keeps everything.
        gamma: fraction of largest magnitude to skip, per tensor.
        keep_ties: skip all elements that tie with the smallest one skipped, and keep all others
            that tie with the smallest one kept.
    """
    bits, fractions = [_magnitude_bits(vector) for vector in vectors], _stack(density)
    size = bits[0].size
    kept = jnp.clip(_count(fractions, size), 0, size)  # [n]
    skipped = jnp.clip(_count(_stack(gamma), size), 0, size - kept)  # [n]
    masks = _largest_masks(bits, jnp.stack([skipped, skipped + kept], axis=1), keep_ties)
    return [
        (mask & ~outliers) | (fraction >= 1)
        for (outliers, mask), fraction in zip(masks, fractions, strict=True)
    ]


def largest_mask(
    x: Float[Array, "*shape"], k: Int32[Array, ""], *, keep_ties: bool = False
) -> Bool[Array, "*shape"]:
    """Return a mask of the k elements of largest magnitude.

    Args:
        x: a tensor.
        k: may be traced; if it is not positive, nothing is kept.
        keep_ties: as in `topk_masks`.
    """
    ((mask,),) = _largest_masks([_magnitude_bits(x)], k[None, None], keep_ties)
    return mask


def _count(fraction: Float32[Array, " n"], size: int) -> Int32[Array, " n"]:
    # In float32 a fraction such as 0.7 is slightly too small, which must not change the floor.
    count = jnp.floor(fraction * jnp.float32(size) * jnp.float32(1 + 2**-22))
    return jnp.minimum(count, jnp.float32(2**31 - 128)).astype(jnp.int32)


def _magnitude_bits(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _stack(fractions: Fractions) -> Float32[Array, " n"]:
    return jnp.stack([jnp.asarray(fraction, jnp.float32) for fraction in fractions])


class _Bounds(NamedTuple):
    """Bounds of the k[i, j] largest elements of `bits[i]`.

    Attributes:
        value: the lowest value of these elements.
        order: if not all elements of this value are among them, those that reach this bound in
            `_tie_order` are; otherwise `_ALL_TIES`.
    """

    value: Int32[Array, "n m"]
    order: Int32[Array, "n m"]


def _largest_masks(
    bits: Sequence[Int32[Array, "*shape"]], k: Int32[Array, "n m"], keep_ties: bool
) -> list[list[Bool[Array, "*shape"]]]:
    """Return masks [n][m] of the k[i, j] largest elements of `bits[i]`."""
    bounds = _find_bounds(bits, k, keep_ties=keep_ties)
    if keep_ties:
        return [[x >= value for value in row] for x, row in zip(bits, bounds.value, strict=True)]
    order = _tie_order(bits[0].shape)
    return [
        [(x > value) | ((x == value) & (order >= last)) for value, last in zip(*row, strict=True)]
        for x, *row in zip(bits, *bounds, strict=True)
    ]


def _tie_order(shape: tuple[int, ...], zero: UInt32[Array, ""] | int = 0) -> Int32[Array, "*_"]:
    """Return the order of ties: a different number for each index below 2^31, from -1.

    Args:
        shape: shape of the tensor.
        zero: as in `flat_index`.
    """
    # Xorshifts and odd factors are bijective on 31 bits too. The high bits decide the order, and
    # those of a product depend on all bits of its factors, so no last xorshift is needed.
    mask = jnp.uint32(2**31 - 1)
    x = (flat_index(shape, zero) * jnp.uint32(0x7FEB352D)) & mask
    x = ((x ^ (x >> 15)) * jnp.uint32(0x846CA68B)) & mask
    return x.astype(jnp.int32) - 1


def _find_bounds(
    bits: Sequence[Int32[Array, "*shape"]], k: Int32[Array, "n m"], *, keep_ties: bool
) -> _Bounds:
    """Return the bounds of the k[i, j] largest elements of `bits[i]`."""
    size = bits[0].size
    if size <= SAMPLE_SIZE:
        bounds = _sort_for_bounds(bits, k, keep_ties)
    else:
        sample = jnp.stack([_sample(tensor) for tensor in bits])
        fraction = jnp.clip(k.astype(jnp.float32) / size, 0.0, 1.0)
        expected = fraction * sample.shape[1]
        # Three standard deviations of the binomial, plus one element at the ends.
        margin = 3.0 * jnp.sqrt(expected * (1.0 - fraction)) + 1.0
        ends = jnp.concatenate([jnp.floor(expected - margin), jnp.ceil(expected + margin)], axis=1)
        high, low = jnp.split(_sorted_kth(sample, ends.astype(jnp.int32)), 2, axis=1)
        bounds = _search(bits, k, low, high, keep_ties)
    return _Bounds(jnp.where(k <= 0, _UNREACHED, bounds.value), bounds.order)


def _sort_for_bounds(
    bits: Sequence[Int32[Array, "*shape"]], k: Int32[Array, "n m"], keep_ties: bool
) -> _Bounds:
    elements = jnp.stack([tensor.reshape(-1) for tensor in bits])
    value = _sorted_kth(elements, k)
    if keep_ties:
        return _Bounds(value, jnp.full_like(k, _ALL_TIES))
    elements, at = elements[:, None], value[..., None]
    above = jnp.sum(elements > at, axis=-1, dtype=jnp.int32)  # [n, m]
    order = jnp.where(elements == at, _tie_order(bits[0].shape).reshape(-1), _ALL_TIES)
    kept = (k - above).reshape(-1, 1)
    return _Bounds(value, _sorted_kth(order.reshape(kept.size, -1), kept).reshape(k.shape))


def _sorted_kth(elements: Int32[Array, "n s"], k: Int32[Array, "n m"]) -> Int32[Array, "n m"]:
    """Return the k[i, j]-th largest of a few elements, with k clipped to [1, s].

    A few thousand elements are sorted faster than counted, and one sort compiles faster.
    """
    ordered = jax.lax.sort(elements, is_stable=False)
    size = elements.shape[1]
    return jnp.take_along_axis(ordered, size - jnp.clip(k, 1, size), axis=1)


class _State(NamedTuple):
    """Intervals [low, high): at least k elements reach low, fewer reach high.

    Attributes:
        low: lower ends; values of elements, or numbers of `_tie_order` once `value` is known.
        high: upper ends.
        reached: number of elements that reach low.
        above: number of elements that reach high.
        k: number of elements that must reach the bound.
        value: the value whose ties are counted, or -1 while values are searched.
        probes: where to count next.
    """

    low: Int32[Array, "n m"]
    high: Int32[Array, "n m"]
    reached: Int32[Array, "n m"]
    above: Int32[Array, "n m"]
    k: Int32[Array, "n m"]
    value: Int32[Array, "n m"]
    probes: Int32[Array, "n m p"]

    @property
    def open(self) -> Bool[Array, "n m"]:
        """Bounds that are not found yet."""
        return (self.high - self.low > 1) & (self.reached != self.k) & (self.k > 0)


def _search(
    bits: Sequence[Int32[Array, "*shape"]],
    k: Int32[Array, "n m"],
    low: Int32[Array, "n m"],
    high: Int32[Array, "n m"],
    keep_ties: bool,
) -> _Bounds:
    """Find all bounds by counting in a single loop, since each loop adds compile time.

    Args:
        bits: the tensors.
        k: number of elements that must reach each bound.
        low: lower ends of the first intervals; the result does not depend on them.
        high: upper ends of the first intervals.
        keep_ties: do not search among ties.
    """
    shape = bits[0].shape

    def counted(state: _State) -> list[list[Int32[Array, "*shape"]]]:
        if keep_ties:
            return [[tensor] * k.shape[1] for tensor in bits]
        zero = jnp.any(state.low < 0).astype(jnp.uint32)  # never, but XLA does not know
        order = _tie_order(shape, zero)
        others = jnp.where(state.value < 0, _UNREACHED, _ALL_TIES)  # with ties, only they count
        return [
            [
                jnp.where(tensor == value, order, jnp.minimum(tensor, other))
                for value, other in zip(*row, strict=True)
            ]
            for tensor, *row in zip(bits, state.value, others, strict=True)
        ]

    def narrow(state: _State) -> _State:
        low, high, reached, above, k, value, probes = state
        counts, least, most = _count_at(counted(state), probes)
        enough = counts >= k[..., None]
        # Probes ascend, so counts descend: the highest probe with enough has the smallest count.
        highest = jnp.max(jnp.where(enough, probes, -1), axis=-1)
        smallest = jnp.min(jnp.where(enough, counts, _UNREACHED), axis=-1)
        reached = jnp.where(highest > low, smallest, reached)
        low = jnp.maximum(low, highest)
        lowest = jnp.min(jnp.where(enough, _UNREACHED, probes), axis=-1)
        largest = jnp.max(jnp.where(enough, -1, counts), axis=-1)
        above = jnp.where(lowest < high, largest, above)
        high = jnp.minimum(high, lowest)
        # Move to the next existing elements: differences of bfloat16 numbers take few values.
        low = jnp.where(enough[..., 0], jnp.maximum(low, least), low)
        high = jnp.where(enough[..., -1], high, jnp.minimum(high, most + 1))
        new = _State(low, high, reached, above, k, value, probes)
        ends = low, high
        if not keep_ties:
            new, ends = _with_ties(new)
        return new._replace(probes=_probes(*ends, probes.shape[-1]))

    start = _State(
        low=jnp.zeros_like(k),
        high=jnp.full_like(k, _UNREACHED),
        reached=jnp.full_like(k, bits[0].size),
        above=jnp.zeros_like(k),
        k=k,
        value=jnp.full_like(k, -1),
        probes=_probes(low - 1, high + 1, _probes_per_bound(k)),
    )
    final = jax.lax.while_loop(lambda state: jnp.any(state.open), narrow, start)
    by_order = final.value >= 0
    return _Bounds(
        jnp.where(by_order, final.value, final.low), jnp.where(by_order, final.low, _ALL_TIES)
    )


def _with_ties(state: _State) -> tuple[_State, tuple[Int32[Array, "n m"], Int32[Array, "n m"]]]:
    """Start to search among the ties of bounds that more than k elements reach.

    Returns:
        The state, and the ends of the intervals to probe next.
    """
    low, high, reached, above, k, value, _ = state
    begin = (value < 0) & (k > 0) & (high - low <= 1) & (reached > k)
    ties, kept = reached - above, k - above
    # The order is uniform: four standard deviations of the binomial.
    share = (ties - kept).astype(jnp.float32) / jnp.maximum(ties, 1)
    margin = 4.0 * jnp.sqrt(share * (1.0 - share) / jnp.maximum(ties, 1)) + 2.0**-20
    first, last = (
        (jnp.clip(end, 0.0, 1.0 - 2.0**-20) * 2.0**31).astype(jnp.int32)
        for end in (share - margin, share + margin)
    )
    new = state._replace(
        low=jnp.where(begin, 0, low),
        high=jnp.where(begin, _UNREACHED, high),
        reached=jnp.where(begin, ties, reached),
        above=jnp.where(begin, 0, above),
        k=jnp.where(begin, kept, k),
        value=jnp.where(begin, low, value),
    )
    return new, (jnp.where(begin, first, new.low), jnp.where(begin, last, new.high))


def _count_at(
    values: Sequence[Sequence[Int32[Array, "*shape"]]], probes: Int32[Array, "n m p"]
) -> tuple[Int32[Array, "n m p"], Int32[Array, "n m"], Int32[Array, "n m"]]:
    """Return how many elements reach each probe, and the elements next to the outer probes.

    Args:
        values: tensors [n][m].
        probes: ascending for each tensor.

    Returns:
        The counts; the smallest element that reaches the first probe; the largest element that
        does not reach the last one.
    """
    pairs = [
        (tensor, row)
        for tensors, rows in zip(values, probes, strict=True)
        for tensor, row in zip(tensors, rows, strict=True)
    ]
    pairs_per_pass = max(1, RESULTS_PER_PASS // (probes.shape[-1] + 2))
    passes = [
        sum_min_max(
            [(tensor >= probe).astype(jnp.int32) for tensor, row in part for probe in row],
            [jnp.where(tensor >= row[0], tensor, _UNREACHED) for tensor, row in part],
            [jnp.where(tensor < row[-1], tensor, -1) for tensor, row in part],
        )
        for part in (pairs[i : i + pairs_per_pass] for i in range(0, len(pairs), pairs_per_pass))
    ]
    counts, least, most = (
        jnp.stack([scalar for results in column for scalar in results])
        for column in zip(*passes, strict=True)
    )
    shape = probes.shape[:2]
    return counts.reshape(probes.shape), least.reshape(shape), most.reshape(shape)


def _probes_per_bound(k: Int32[Array, "n m"]) -> int:
    """Return how many probes, with the two elements of `_count_at`, fit into one pass."""
    return min(max(RESULTS_PER_PASS // k.size - 2, 4), 8)


def _probes(
    low: Int32[Array, "n m"], high: Int32[Array, "n m"], count: int
) -> Int32[Array, "n m {count}"]:
    """Return ascending probes, strictly inside the interval unless it is empty.

    The first and the last probe are next to the bounds, which are elements, often with ties.
    """
    first, last = low + 1, high - 1
    index = jnp.arange(count, dtype=jnp.int32)
    width = jnp.maximum(last - first, 0)[..., None]
    step = jnp.maximum(jax.lax.div(width, count - 1), 1)
    inner = first[..., None] + jnp.minimum(step * index, width)
    return jnp.where(index == count - 1, jnp.maximum(first, last)[..., None], inner)


def _sample(bits: Int32[Array, "*shape"]) -> Int32[Array, " s"]:
    """Return about SAMPLE_SIZE elements on a grid over the tensor."""
    per_axis = round(SAMPLE_SIZE ** (1 / bits.ndim))
    # One axis at a time: the TPU compiler runs out of memory for a slice along two.
    for axis, size in enumerate(bits.shape):
        bits = jax.lax.slice_in_dim(bits, 0, size, math.ceil(size / per_axis), axis)
    return bits.reshape(-1)
