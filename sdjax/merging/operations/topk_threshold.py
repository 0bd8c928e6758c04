"""Selection by magnitude without sorting the tensor.

On a CPU, XLA sorts a few million float32 per second, and on a mesh it gathers the tensor to do so.
Counting how many elements reach a bound runs at memory speed and communicates little.

The bits of a non-negative float, read as an integer, have the same order as the floats, so the k-th
largest magnitude is found among integers. A sorted sample of the tensor provides an initial
interval. Each pass counts at several probes inside the interval and then moves its bounds to the
elements next to them (differences of bfloat16 numbers take few values, which many elements share),
until exactly k elements reach a bound or the interval is empty. If the sample is misleading, about
ten passes narrow the full range of bits. The result is always exact.

Axes: *shape (of the tensor), n (tensors), m (bounds per tensor), p (probes per bound), s (samples).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int32

from sdjax.xla.reductions import sum_min_max

RESULTS_PER_PASS = 36  # with more, a pass costs more time than it saves
SAMPLE_SIZE = 2**12  # approximate; tensors up to this size are sorted instead

_UNREACHED = 2**31 - 1  # a bound that no element reaches

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
    (bounds,) = _find_bounds([bits], k[None])
    exact = jnp.stack([jnp.min(jnp.where(bits >= bound, bits, _UNREACHED)) for bound in bounds])
    magnitude = jax.lax.bitcast_convert_type(jnp.where(k > x.size, 0, exact), jnp.float32)
    return jnp.where(k <= 0, jnp.inf, magnitude)


def topk_masks(
    vectors: Sequence[Float[Array, "*shape"]], density: Fractions
) -> list[Bool[Array, "*shape"]]:
    """Return masks of the floor(density * size) elements of largest magnitude.

    At least one element is kept. Elements that tie with the smallest one kept are kept too, as in
    the reference code of TIES, so that the choice does not depend on their order; for small
    differences of bfloat16 numbers these can be many. The product is rounded to 22 bits, so that a
    density that is slightly too small in float32 gives the same count as in float64.

    Args:
        vectors: n tensors of the same shape.
        density: fraction to keep, per tensor: 1 or more keeps everything, 0 or less nothing.
    """
    bits, fractions = [_magnitude_bits(vector) for vector in vectors], _stack(density)
    size = bits[0].size
    counts = jnp.where(fractions > 0, jnp.maximum(_count(fractions, size), 1), 0)  # [n]
    bounds = _find_bounds(bits, counts[:, None])
    return [
        (tensor >= bound) | (fraction >= 1)
        for tensor, (bound,), fraction in zip(bits, bounds, fractions, strict=True)
    ]


def magnitude_band_masks(
    vectors: Sequence[Float[Array, "*shape"]], density: Fractions, gamma: Fractions
) -> list[Bool[Array, "*shape"]]:
    """Return masks of the floor(density * size) largest elements after skipping outliers.

    The outliers are the floor(gamma * size) largest elements, or fewer if not enough would remain.
    Elements that tie with the smallest one skipped are skipped too; other ties are treated as in
    `topk_masks`.

    Args:
        vectors: n tensors of the same shape.
        density: fraction to keep, per tensor; 1 or more keeps everything.
        gamma: fraction of largest magnitude to skip, per tensor.
    """
    bits, fractions = [_magnitude_bits(vector) for vector in vectors], _stack(density)
    size = bits[0].size
    kept = jnp.clip(_count(fractions, size), 0, size)  # [n]
    skipped = jnp.clip(_count(_stack(gamma), size), 0, size - kept)  # [n]
    bounds = _find_bounds(bits, jnp.stack([skipped, skipped + kept], axis=1))
    return [
        ((tensor < high) & (tensor >= low)) | (fraction >= 1)
        for tensor, (high, low), fraction in zip(bits, bounds, fractions, strict=True)
    ]


def _count(fraction: Float32[Array, " n"], size: int) -> Int32[Array, " n"]:
    # In float32 a fraction such as 0.7 is slightly too small, which must not change the floor.
    count = jnp.floor(fraction * jnp.float32(size) * jnp.float32(1 + 2**-22))
    return jnp.minimum(count, jnp.float32(2**31 - 128)).astype(jnp.int32)


def _magnitude_bits(x: Float[Array, "*shape"]) -> Int32[Array, "*shape"]:
    return jax.lax.bitcast_convert_type(jnp.abs(x.astype(jnp.float32)), jnp.int32)


def _stack(fractions: Fractions) -> Float32[Array, " n"]:
    return jnp.stack([jnp.asarray(fraction, jnp.float32) for fraction in fractions])


def _find_bounds(
    bits: Sequence[Int32[Array, "*shape"]], k: Int32[Array, "n m"]
) -> Int32[Array, "n m"]:
    """Return the bounds that select the k[i, j] largest elements of `bits[i]` and their ties."""
    size = bits[0].size
    if size <= SAMPLE_SIZE:
        elements = jnp.stack([tensor.reshape(-1) for tensor in bits])
        return jnp.where(k <= 0, _UNREACHED, _sorted_kth(elements, k))
    sample = jnp.stack([_sample(tensor) for tensor in bits])
    fraction = jnp.clip(k.astype(jnp.float32) / size, 0.0, 1.0)
    expected = fraction * sample.shape[1]
    # Three standard deviations of the binomial, plus one element at the ends.
    margin = 3.0 * jnp.sqrt(expected * (1.0 - fraction)) + 1.0
    ends = jnp.concatenate([jnp.floor(expected - margin), jnp.ceil(expected + margin)], axis=1)
    high, low = jnp.split(_sorted_kth(sample, ends.astype(jnp.int32)), 2, axis=1)
    return _search(bits, k, low, high)


def _sorted_kth(elements: Int32[Array, "n s"], k: Int32[Array, "n m"]) -> Int32[Array, "n m"]:
    """Return the k[i, j]-th largest of a few elements, with k clipped to [1, s].

    A few thousand elements are sorted faster than counted, and one sort compiles faster.
    """
    ordered = jax.lax.sort(elements, is_stable=False)
    size = elements.shape[1]
    return jnp.take_along_axis(ordered, size - jnp.clip(k, 1, size), axis=1)


def _search(
    bits: Sequence[Int32[Array, "*shape"]],
    k: Int32[Array, "n m"],
    low: Int32[Array, "n m"],
    high: Int32[Array, "n m"],
) -> Int32[Array, "n m"]:
    """Find all bounds by counting in a single loop, since each loop adds compile time.

    Args:
        bits: the tensors.
        k: number of elements that must reach each bound.
        low: lower ends of the first intervals; the result does not depend on them.
        high: upper ends of the first intervals.
    """

    # Interval [low, high): at least k elements reach low, `reached` of them; fewer reach high.
    def unfinished(state: tuple) -> jax.Array:
        low, high, reached, _ = state
        return jnp.any((high - low > 1) & (reached != k) & (k > 0))

    def narrow(state: tuple) -> tuple:
        low, high, reached, probes = state
        counts, least, most = _count_at(bits, probes)
        enough = counts >= k[..., None]
        # Probes ascend, so counts descend: the highest probe with enough has the smallest count.
        highest = jnp.max(jnp.where(enough, probes, -1), axis=-1)
        smallest = jnp.min(jnp.where(enough, counts, _UNREACHED), axis=-1)
        reached = jnp.where(highest > low, smallest, reached)
        low = jnp.maximum(low, highest)
        high = jnp.minimum(high, jnp.min(jnp.where(enough, _UNREACHED, probes), axis=-1))
        # Move to the next existing elements: differences of bfloat16 numbers take few values.
        low = jnp.where(enough[..., 0], jnp.maximum(low, least), low)
        high = jnp.where(enough[..., -1], high, jnp.minimum(high, most + 1))
        return low, high, reached, _probes(low, high, probes.shape[-1])

    start = (jnp.zeros_like(k), jnp.full_like(k, _UNREACHED), jnp.full_like(k, bits[0].size))
    first = _probes(low - 1, high + 1, _probes_per_bound(k))
    low, *_ = jax.lax.while_loop(unfinished, narrow, (*start, first))
    return jnp.where(k <= 0, _UNREACHED, low)


def _count_at(
    bits: Sequence[Int32[Array, "*shape"]], probes: Int32[Array, "n m p"]
) -> tuple[Int32[Array, "n m p"], Int32[Array, "n m"], Int32[Array, "n m"]]:
    """Return how many elements reach each probe, and the elements next to the outer probes.

    Returns:
        The counts; the smallest element that reaches the first probe; the largest element that
        does not reach the last one.
    """
    pairs = [(tensor, row) for tensor, rows in zip(bits, probes, strict=True) for row in rows]
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
