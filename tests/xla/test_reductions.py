import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.xla.reductions import count_true, sum_min_max, sums


@pytest.mark.parametrize("shape", [(64, 128), (3, 5, 48), (1000,), (7, 13), (1,), ()])
def test_several_sums_are_as_accurate_as_one(shape):
    rng = np.random.default_rng(0)
    terms = [jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(3)]
    found = jax.jit(sums)(terms)
    for term, got in zip(terms, found, strict=True):
        wide = np.asarray(term, np.float64)
        assert abs(float(got) - wide.sum()) <= 2e-7 * np.abs(wide).sum()


def test_opposite_vectors_cancel():
    term = jnp.asarray(np.random.default_rng(1).standard_normal((96, 256)), jnp.float32)
    one, other = jax.jit(lambda x: sums([x * x, -x * x]))(term)
    assert float(one + other) == 0.0


@pytest.mark.parametrize("shape", [(64, 128), (1000,), (3, 5, 7)])
def test_counts_are_exact(shape):
    masks = [np.random.default_rng(n).random(shape) < 0.3 for n in range(3)]
    assert [int(n) for n in jax.jit(count_true)(masks)] == [mask.sum() for mask in masks]
    assert [int(n) for n in jax.jit(count_true)(masks[:1])] == [masks[0].sum()]


@pytest.mark.parametrize("shape", [(64, 128), (1000,), (3, 5, 7)])
def test_integers_are_summed_and_compared_in_one_pass(shape):
    numbers = np.random.default_rng(0).integers(-1000, 1000, shape, np.int32)

    found = jax.jit(lambda x: sum_min_max([x, 3 * x], [x], [2 * x, -x]))(numbers)
    expected = (
        [numbers.sum(), 3 * numbers.sum()],
        [numbers.min()],
        [2 * numbers.max(), -numbers.min()],
    )
    for got, reference in zip(found, expected, strict=True):
        np.testing.assert_array_equal(got, reference)


def test_several_sums_read_their_input_once():
    """Check the bytes accessed: XLA counts an operand once for each loop that reads it."""
    vectors = [jnp.zeros((256, 512), jnp.float32)] * 3

    def products(a, b, c):
        return sums([a * a, a * b, a * c, b * b, b * c, c * c])

    analysis = jax.jit(products).lower(*vectors).compile().cost_analysis()
    assert analysis["bytes accessed"] < 3.6 * vectors[0].nbytes * (1 + 6 / 8)
