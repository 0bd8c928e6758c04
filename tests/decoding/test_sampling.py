import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.decoding.sampling import Sampling, mask_min_p, mask_top_k, mask_top_p, sample_tokens

torch = pytest.importorskip("torch", reason="needs torch, the reference of the parity tests")
logits_process = pytest.importorskip("transformers.generation.logits_process")


@pytest.fixture
def logits():
    return np.random.default_rng(2).normal(scale=3, size=(16, 200)).astype(np.float32)


@pytest.mark.parametrize(
    ("mask", "warper"),
    [
        *(
            (lambda x, k=k: mask_top_k(x, k), logits_process.TopKLogitsWarper(k))
            for k in (1, 7, 200)
        ),
        *(
            (lambda x, p=p: mask_top_p(x, jnp.float32(p)), logits_process.TopPLogitsWarper(p))
            for p in (0.1, 0.5, 0.95)
        ),
        *(
            (lambda x, p=p: mask_min_p(x, jnp.float32(p)), logits_process.MinPLogitsWarper(p))
            for p in (0.01, 0.2, 1.0)
        ),
    ],
)
def test_masks_equal_transformers(logits, mask, warper):
    np.testing.assert_array_equal(mask(jnp.asarray(logits)), warper(None, torch.tensor(logits)))


def test_combined_masks_equal_transformers(logits):
    sampling = Sampling(temperature=1.7, top_k=20, top_p=0.8, min_p=0.05)
    warpers = [
        logits_process.TemperatureLogitsWarper(1.7),
        logits_process.TopKLogitsWarper(20),
        logits_process.TopPLogitsWarper(0.8),
        logits_process.MinPLogitsWarper(0.05),
    ]
    expected = torch.tensor(logits)
    for warper in warpers:
        expected = warper(None, expected)
    keys = jax.random.split(jax.random.key(1), 16)
    all_keys = jax.vmap(lambda key: jax.random.split(key, 2000), out_axes=1)(keys)
    tokens = jax.lax.map(
        lambda keys: sample_tokens(jnp.asarray(logits), keys, top_k=20, **sampling.scalar_params()),
        all_keys,
    )
    counts = np.stack([np.bincount(column, minlength=200) for column in np.asarray(tokens).T])
    expected_probs = torch.softmax(expected, -1).numpy()
    assert not counts[expected_probs == 0].any()
    np.testing.assert_allclose(counts / 2000, expected_probs, atol=0.05)


def test_frequencies_follow_the_softmax_with_temperature():
    logits = jnp.array([0.0, 1.0, 2.0, -1.0])
    keys = jax.random.split(jax.random.key(0), 20_000)
    tokens = sample_tokens(jnp.tile(logits, (20_000, 1)), keys, temperature=jnp.float32(1.5))
    frequencies = np.bincount(np.asarray(tokens), minlength=4) / 20_000
    expected = np.exp(np.array([0.0, 1.0, 2.0, -1.0]) / 1.5)
    np.testing.assert_allclose(frequencies, expected / expected.sum(), atol=0.015)


@pytest.mark.parametrize(
    "invalid",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0}, {"min_p": 2}],
)
def test_invalid_parameters_raise_user_error(invalid):
    with pytest.raises(UserError, match=next(iter(invalid))):
        Sampling(**invalid)
