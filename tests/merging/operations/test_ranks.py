import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.merging.operations.ranks import outranks, rank_fraction


@pytest.mark.parametrize("shape", [(1,), (2,), (37,), (5, 64), (2, 3, 17)])
def test_rank_fraction_equals_two_argsorts(shape):
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    ranks = np.abs(x).argsort(axis=-1).argsort(axis=-1)
    expected = ranks / max(shape[-1] - 1, 1)
    np.testing.assert_allclose(jax.jit(rank_fraction)(x), expected, rtol=1e-6)


def test_equal_magnitudes_share_the_highest_rank():
    x = jnp.array([[1.0, -1.0, 0.0, 2.0, 1.0]])
    np.testing.assert_allclose(rank_fraction(x), [[0.75, 0.75, 0.0, 1.0, 0.75]])


@pytest.mark.parametrize("shape", [(2,), (37,), (5, 64)])
def test_outranks_compares_the_rank_fraction(shape):
    rng = np.random.default_rng(0)
    x = rng.standard_normal(shape).astype(np.float32)
    # Half a rank off, so that rounding does not matter.
    ranks = rng.integers(-2, shape[-1] + 2, shape)
    threshold = ((ranks + 0.5) / (shape[-1] - 1)).astype(np.float32)
    got = jax.jit(outranks)(x, threshold)
    np.testing.assert_array_equal(got, np.asarray(rank_fraction(jnp.asarray(x))) > threshold)


def test_outranks_at_0_and_1():
    x = jnp.array([3.0, -1.0, 2.0])
    assert outranks(x, jnp.full(3, -0.1)).all()
    assert not outranks(x, jnp.full(3, 1.0)).any()
    assert not outranks(x, jnp.full(3, jnp.inf)).any()
