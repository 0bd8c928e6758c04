import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.merging.operations.random import bernoulli, bits, uniform

KEY = jax.random.key(7)


def reference_bits(words, shape, stream):
    """Compute the same hash with Python integers."""
    mask = 2**32 - 1

    def mix(x):
        x = (x ^ (x >> 16)) * 0x7FEB352D & mask
        x = (x ^ (x >> 15)) * 0x846CA68B & mask
        return x ^ (x >> 16)

    first = stream * 0x9E3779B9 & mask
    for word in words:
        first = mix(first ^ int(word))
    second = mix((first + 0x85EBCA6B) & mask)
    out = [mix((mix(i ^ first) + second) & mask) for i in range(int(np.prod(shape)))]
    return np.array(out, np.uint32).reshape(shape)


@pytest.mark.parametrize("impl", ["threefry2x32", "rbg"])
def test_bits_are_the_hash_of_the_flat_index(impl):
    key = jax.random.key(7, impl=impl)
    words = np.asarray(jax.random.key_data(key)).ravel()
    for shape, stream in [((5,), 0), ((3, 4), 2), ((2, 3, 4), 1)]:
        got = jax.jit(bits, static_argnums=(1, 2))(key, shape, stream)
        np.testing.assert_array_equal(got, reference_bits(words, shape, stream))


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.9])
def test_bernoulli_has_the_right_probability_and_no_structure(probability):
    draws = np.asarray(bernoulli(KEY, probability, (1024, 1024)), np.float64)
    deviation = np.sqrt(probability * (1 - probability))
    assert abs(draws.mean() - probability) < 5 * deviation / 1024
    # Sums of rows and of columns have the variance of independent draws.
    for axis in (0, 1):
        assert draws.mean(axis=axis).std() == pytest.approx(deviation / 32, rel=0.12)
    centered = draws - probability
    for lagged in (centered[:, 1:] * centered[:, :-1], centered[1:] * centered[:-1]):
        assert abs(lagged.mean()) < 5 * deviation**2 / 1024


def test_streams_and_keys_are_independent():
    draws = [uniform(KEY, (512, 512), stream=s) for s in (0, 1)]
    draws.append(uniform(jax.random.key(8), (512, 512)))
    for i in range(3):
        for j in range(i):
            r = np.corrcoef(np.ravel(draws[i]), np.ravel(draws[j]))[0, 1]
            assert abs(r) < 5 / 512


def test_bernoulli_at_0_and_1():
    assert not bernoulli(KEY, 0.0, (256, 256)).any()
    assert bernoulli(KEY, jnp.float32(1.0), (256, 256)).all()
