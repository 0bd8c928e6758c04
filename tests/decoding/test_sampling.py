import jax
import jax.numpy as jnp
import numpy as np

from sdjax.decoding.sampling import nucleus, sample


def test_frequencies_follow_the_softmax_of_logits_over_temperature():
    logits = jnp.array([0.0, 1.0, 2.0, -1.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    drawn = sample(jnp.tile(logits, (20_000, 1)), keys, jnp.float32(1.5), None)
    frequencies = np.bincount(np.asarray(drawn), minlength=4) / 20_000
    expected = np.exp(np.array([0.0, 1.0, 2.0, -1.0]) / 1.5)
    np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.015)


def test_nucleus_is_the_smallest_set_that_holds_the_mass():
    logits = jnp.log(jnp.array([[0.1, 0.5, 0.15, 0.25], [0.97, 0.01, 0.01, 0.01]]))
    kept = nucleus(logits, jnp.float32(0.7))
    assert kept.tolist() == [[False, True, False, True], [True, False, False, False]]
