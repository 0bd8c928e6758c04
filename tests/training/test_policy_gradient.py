"""Policy gradient: its data, its loss, and a round of training on a tiny model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.decoding.sampling import Sampling
from sdjax.models.lora import init_adapter
from sdjax.models.params import init_params
from sdjax.models.transformer import forward, unembed
from sdjax.testing import tiny_config
from sdjax.training.api import train_policy_gradient
from sdjax.training.config import RunTrainingConfig
from sdjax.training.jit_cache import JitCache
from sdjax.training.packing import Example
from sdjax.training.policy_gradient import (
    MAX_CORRECTION,
    AdvantageExample,
    clipped_surrogate,
    policy_gradient_data,
)
from sdjax.training.trainable import lora_finetune

CONFIG = tiny_config(
    vocab_size=37, num_heads=2, num_kv_heads=1, max_seq_len=128, tie_embeddings=True
)
SETTINGS = RunTrainingConfig(
    objective="entropic", beta=0.1, learning_rate=3e-3, batch_size=2, max_steps=6, rank=4, alpha=8.0
)
SAMPLES = [
    AdvantageExample(example=Example(prompt=(3, 4), target=target), advantage=advantage)
    for target, advantage in (((5, 6, 1), 1.5), ((7, 1), -0.5), ((8, 9, 10, 1), -1.0))
]
JITS = JitCache()


@pytest.fixture(scope="module")
def trainable():
    params = init_params(CONFIG, jax.random.key(0), jnp.float32)
    params = jax.tree.map(lambda leaf: 3 * leaf, params)  # so that no distribution is uniform
    return lora_finetune(CONFIG, params, init_adapter(CONFIG, jax.random.key(1), rank=4, alpha=8))


def logits(trainable, example):
    tokens = jnp.array([example.prompt + example.target])
    positions = jnp.arange(tokens.shape[1])[None]
    hidden, _ = forward(trainable.frozen, None, tokens, config=CONFIG, positions=positions)
    values = unembed(trainable.frozen, hidden, config=CONFIG)
    return np.asarray(values, np.float64)[0, len(example.prompt) - 1 : -1]


def logprobs(values, targets):
    probs = np.exp(values - values.max(-1, keepdims=True))
    return np.log(probs / probs.sum(-1, keepdims=True))[np.arange(len(targets)), list(targets)]


def sampled(values, temperature, top_p):
    """Return the logits of sampling, by the definition of the nucleus."""
    values = values / temperature
    for row in values:
        order = np.argsort(-row)
        probs = np.exp(row[order] - row.max())
        before = np.cumsum(probs / probs.sum()) - probs / probs.sum()
        row[order[before >= top_p]] = -np.inf
    return values


@pytest.mark.parametrize(("temperature", "top_p"), [(1.0, 1.0), (0.5, 0.9)])
def test_data_equals_the_definition(trainable, temperature, top_p):
    sampling = Sampling(temperature=temperature, top_p=top_p)
    data = policy_gradient_data(trainable, SAMPLES, SETTINGS, sampling=sampling, jit_cache=JITS)
    for row, sample in enumerate(SAMPLES):
        target = sample.example.target
        at = slice(1, 1 + len(target))  # the tokens before the targets
        values = logits(trainable, sample.example)
        start = logprobs(values, target)
        np.testing.assert_allclose(data["start"][row, at], start, rtol=1e-4, atol=1e-5)
        with np.errstate(divide="ignore"):
            drawn = logprobs(sampled(values, temperature, top_p), target)
        correction = np.minimum(np.exp(start - drawn), MAX_CORRECTION)
        expected = sample.advantage * correction
        np.testing.assert_allclose(data["advantages"][row, at], expected, rtol=1e-4)
        outside = np.delete(data["advantages"][row], np.arange(1, 1 + len(target)))
        assert not outside.any()


def test_round_follows_the_advantages(trainable):
    copy = dataclasses.replace(trainable, trainable=jax.tree.map(jnp.copy, trainable.trainable))
    factors, history = train_policy_gradient(
        *(copy, SAMPLES, SETTINGS),
        sampling=Sampling(temperature=1.0),
        key=jax.random.key(2),
        jit_cache=JITS,
    )
    assert len(history) == 6
    assert history[0]["log_ratio"] == pytest.approx(0, abs=1e-6)
    assert history[0]["clip_fraction"] == 0
    after = dataclasses.replace(trainable, trainable=factors)
    before, now = (
        policy_gradient_data(
            one, SAMPLES, SETTINGS, sampling=Sampling(temperature=1.0), jit_cache=JITS
        )["start"].sum(1)
        for one in (trainable, after)
    )
    gain = now - before
    assert gain[0] > 0
    assert gain[0] > max(gain[1:])


def test_surrogate_equals_the_definition():
    log_ratios = jnp.array([[0.5, 0.5, -0.5, -0.5, 0.1]])
    advantages = jnp.array([[1.0, -1.0, 1.0, -1.0, 2.0]])
    expected = [1.2, -np.exp(0.5), np.exp(-0.5), -0.8, 2 * np.exp(0.1)]
    np.testing.assert_allclose(
        clipped_surrogate(log_ratios, advantages, 0.2), [expected], rtol=1e-6
    )
