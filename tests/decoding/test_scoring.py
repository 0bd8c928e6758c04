"""Scores of texts against the decoder, which computes the same numbers token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.decoding.scoring import Scorer
from sdjax.models.config import ModelConfig
from sdjax.models.params import init_params

CONFIG = ModelConfig(
    family="qwen3",
    vocab_size=50,
    hidden_size=16,
    intermediate_size=32,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_seq_len=24,
)
PROMPTS = [[3, 4, 5], [9], [11, 12, 13, 14, 15, 16]]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 9, init_params(CONFIG, jax.random.key(1), jnp.float32))


@pytest.fixture(scope="module")
def scorer():
    return Scorer(CONFIG, rows=2, buckets=(8, 16, 32))


def test_scores_are_the_log_probabilities_of_decoding(params, scorer):
    decoder = Decoder(
        CONFIG, DecoderConfig(slots=4, prefill_batch=4, buckets=(8,), max_new_tokens=9)
    )
    completions = decoder.decode(params, None, PROMPTS, logprobs=True)
    texts = [(prompt, one.tokens) for prompt, one in zip(PROMPTS, completions, strict=True)]
    for score, completion in zip(scorer.score(params, None, texts), completions, strict=True):
        np.testing.assert_allclose(score.logprobs, completion.logprobs, atol=1e-4)
        assert score.greedy
        assert score.total == pytest.approx(sum(completion.logprobs), abs=1e-3)


def test_another_continuation_is_less_likely_and_not_greedy(params, scorer):
    (score,) = scorer.score(params, None, [([3, 4, 5], [7, 8, 7])])
    decoder = Decoder(
        CONFIG, DecoderConfig(slots=1, prefill_batch=1, buckets=(8,), max_new_tokens=3)
    )
    (best,) = decoder.decode(params, None, [[3, 4, 5]])
    assert best.tokens != (7, 8, 7)
    (likelier,) = scorer.score(params, None, [([3, 4, 5], best.tokens)])
    assert not score.greedy
    assert score.logprobs[0] <= likelier.logprobs[0]


def test_other_weights_compile_nothing(params):
    fresh = Scorer(CONFIG, rows=2, buckets=(8, 16))
    texts = [(prompt, [5, 6, 7]) for prompt in PROMPTS]
    for scale in (1.0, 0.9, 1.1):
        fresh.score(jax.tree.map(lambda x, scale=scale: x * scale, params), None, texts)
    assert fresh._score._cache_size() == 2


def test_what_cannot_be_scored_fails_alone(params, scorer):
    scores = scorer.score(params, None, [([], [3]), ([3], []), ([3] * 20, [4] * 5), ([3], [4])])
    assert [score.failure for score in scores] == [
        "the prompt or the continuation is empty",
        "the prompt or the continuation is empty",
        "the text has 25 tokens, of which at most 24 fit",
        None,
    ]
