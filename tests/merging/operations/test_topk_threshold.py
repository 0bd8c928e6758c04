import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.merging.operations.topk_threshold import (
    kth_largest_magnitudes,
    magnitude_band_masks,
    topk_masks,
)


def kth_magnitude(x, k):
    (magnitude,) = jax.jit(kth_largest_magnitudes)(x, jnp.array([k]))
    return float(magnitude)


def largest_of(x, density):
    (mask,) = jax.jit(topk_masks)([x], [density])
    return mask


def below_largest_of(x, density, gamma):
    (mask,) = jax.jit(magnitude_band_masks)([x], [density], [gamma])
    return mask


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_kth_magnitude_is_exact(scale):
    x = (scale * np.random.default_rng(0).standard_normal((17, 23))).astype(np.float32)
    ordered = np.sort(np.abs(x).ravel())[::-1]
    places = [1, 2, 100, 390, 391]
    found = jax.jit(kth_largest_magnitudes)(x, jnp.array([*places, 0, 392]))
    np.testing.assert_array_equal(found, [*(ordered[k - 1] for k in places), np.inf, 0.0])


def test_kth_magnitude_of_special_values():
    x = jnp.array([0.0, -0.0, 1e-42, -3.0, jnp.inf])
    assert [kth_magnitude(x, k) for k in (2, 3, 4)] == [
        3.0,
        pytest.approx(1e-42, rel=1e-2),
        0.0,
    ]


def test_topk_masks_keep_the_fraction():
    x = jnp.array([[0.1, -4.0, 3.0, 2.0], [2.0, 1.0, -0.5, 0.0]])
    keep = largest_of
    np.testing.assert_array_equal(keep(x, 0.25), jnp.abs(x) >= 3)
    three = keep(x, 0.4)  # one of two equal elements
    assert three.sum() == 3
    assert (jnp.abs(x)[three] >= 2).all()
    np.testing.assert_array_equal(topk_masks([x], [0.4], keep_ties=True)[0], jnp.abs(x) >= 2)
    assert not keep(x, 0.0).any()
    assert keep(x, 0.1).sum() == 1  # floor(0.8) = 0, but one is kept
    assert keep(x, 1.0).all()


@pytest.mark.parametrize("shape", [(70_001,), (300, 301), (30, 40, 61)])
@pytest.mark.parametrize("share", [1e-5, 0.007, 0.2, 0.5, 0.999])
def test_kth_magnitude_of_large_tensors_is_exact(shape, share):
    """Check tensors that are large enough for a sample to give the first interval."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    k = max(1, int(share * x.size))
    assert kth_magnitude(x, k) == np.sort(np.abs(x).ravel())[-k]


@pytest.mark.parametrize("kind", ["sample misleads", "few values", "all equal", "all zero"])
def test_kth_magnitude_with_a_misleading_sample(kind):
    rng = np.random.default_rng(1)
    x = rng.standard_normal((512, 512)).astype(np.float32)
    if kind == "sample misleads":
        x[::8, ::8] *= 1e20  # exactly the sampled places
    elif kind == "few values":
        x = np.round(x)
    else:
        x = np.full_like(x, 3.0 if kind == "all equal" else 0.0)
    ordered = np.sort(np.abs(x).ravel())[::-1]
    for k in (1, 1000, 50_000, x.size):
        assert kth_magnitude(x, k) == ordered[k - 1]


@pytest.mark.parametrize("bounds", [1, 2, 40])
def test_several_ranks_of_several_vectors_at_once(bounds):
    """Check bounds that need several passes over the elements."""
    rng = np.random.default_rng(2)
    x = jnp.asarray(rng.standard_normal((3, 100, 120)), jnp.bfloat16).astype(jnp.float32)
    k = np.linspace(1, x.size, bounds).astype(np.int32)
    found = jax.jit(kth_largest_magnitudes)(x, k)
    np.testing.assert_array_equal(found, np.sort(np.abs(x).ravel())[::-1][k - 1])


def test_magnitude_band_skips_the_outliers():
    x = jnp.array([0.1, -9.0, 3.0, 2.0, -7.0, 1.0, -0.5, 0.2, 5.0, 4.0])
    keep = below_largest_of
    magnitude = jnp.abs(x)
    np.testing.assert_array_equal(keep(x, 0.3, 0.2), (magnitude <= 5) & (magnitude >= 3))
    np.testing.assert_array_equal(keep(x, 0.9, 0.5), magnitude < 9)  # no room for five
    assert not keep(x, 0.05, 0.2).any()
    assert keep(x, 1.0, 0.2).all()


def test_each_vector_has_its_own_density():
    x = np.random.default_rng(2).standard_normal((3, 300, 301)).astype(np.float32)
    x[1] *= 1e-20
    shares = [0.1, 0.5, 0.0]
    masks = jax.jit(topk_masks)(list(x), shares)
    for vector, mask, share in zip(x, masks, shares, strict=True):
        np.testing.assert_array_equal(mask, largest_of(vector, share))
        assert mask.sum() == int(share * vector.size)
    both = jax.jit(magnitude_band_masks)(list(x), shares, [0.05, 0.2, 0.1])
    for vector, mask, share, gamma in zip(x, both, shares, [0.05, 0.2, 0.1], strict=True):
        np.testing.assert_array_equal(mask, below_largest_of(vector, share, gamma))


def small_changes(shape, size, seed=0):
    """Return the differences of bfloat16 weights after small changes, which take few values."""
    rng = np.random.default_rng(seed)
    base = jnp.asarray(0.02 * rng.standard_normal(shape), jnp.bfloat16)
    expert = (base + size * rng.standard_normal(shape).astype(np.float32)).astype(jnp.bfloat16)
    return expert.astype(jnp.float32) - base.astype(jnp.float32)


def test_all_ties_of_small_bfloat16_changes_are_kept_on_request():
    vector = small_changes((300, 301), 0.0001)
    (mask,) = topk_masks([vector], [0.2], keep_ties=True)
    kept, left = np.abs(vector)[mask], np.abs(vector)[~mask]
    assert kept.min() > left.max()
    np.testing.assert_allclose(np.mean(mask), 0.37, atol=0.02)


def tie_order(size):
    """Return the order in which ties are kept, from uint32 arithmetic of NumPy."""
    x = np.arange(size, dtype=np.uint32)
    x = (x * np.uint32(0x7FEB352D)) & np.uint32(2**31 - 1)
    x = ((x ^ (x >> 15)) * np.uint32(0x846CA68B)) & np.uint32(2**31 - 1)
    assert len(np.unique(x)) == size
    return x


def exactly(vector, k):
    """Return a mask of the k largest magnitudes, ties by `tie_order`."""
    magnitudes = np.abs(vector).ravel()
    ranked = np.lexsort((-tie_order(magnitudes.size).astype(np.int64), -magnitudes))
    mask = np.zeros(magnitudes.size, bool)
    mask[ranked[:k]] = True
    return mask.reshape(vector.shape)


@pytest.mark.parametrize("shape", [(40,), (300, 301)])
def test_ties_are_broken_exactly_by_a_hash_of_the_index(shape):
    vectors = [small_changes(shape, 1e-4), small_changes(shape, 1e-5), jnp.zeros(shape)]
    density, gamma = [0.2, 0.01, 0.3], [0.01, 0.1, 0.3]
    kept = jax.jit(topk_masks)(vectors, density)
    band = jax.jit(magnitude_band_masks)(vectors, density, gamma)
    size = vectors[0].size
    for vector, mask, middle, d, g in zip(vectors, kept, band, density, gamma, strict=True):
        x, k, skipped = np.asarray(vector), int(d * size), int(g * size)
        np.testing.assert_array_equal(mask, exactly(x, max(k, 1)))
        np.testing.assert_array_equal(middle, exactly(x, skipped + k) & ~exactly(x, skipped))
    # Where all elements are equal, no rows or columns are favored.
    for axis in range(len(shape)):
        deviation = np.sqrt(0.3 * 0.7 / shape[axis])
        assert np.abs(np.mean(kept[-1], axis=axis) - 0.3).max() < 5 * deviation
