import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.merging.magnitude import kth_magnitude, largest


@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_kth_magnitude_is_exact(scale):
    x = (scale * np.random.default_rng(0).standard_normal((17, 23))).astype(np.float32)
    ordered = np.sort(np.abs(x).ravel())[::-1]
    find = jax.jit(kth_magnitude)
    for k in (1, 2, 100, 390, 391):
        assert float(find(x, k)) == ordered[k - 1]
    assert np.isinf(find(x, 0))
    assert float(find(x, 392)) == 0.0


def test_kth_magnitude_of_special_values():
    x = jnp.array([0.0, -0.0, 1e-42, -3.0, jnp.inf])
    assert [float(kth_magnitude(x, k)) for k in (2, 3, 4)] == [
        3.0,
        pytest.approx(1e-42, rel=1e-2),
        0.0,
    ]


def test_largest_keeps_the_share_and_all_that_tie():
    x = jnp.array([[0.1, -4.0, 3.0, 2.0], [2.0, 1.0, -0.5, 0.0]])
    keep = jax.jit(largest)
    np.testing.assert_array_equal(keep(x, 0.25), jnp.abs(x) >= 3)
    np.testing.assert_array_equal(keep(x, 0.4), jnp.abs(x) >= 2)  # three asked for, one tie
    assert not keep(x, 0.0).any()
    assert not keep(x, 0.1).any()  # floor(0.8) = 0
    assert keep(x, 1.0).all()
