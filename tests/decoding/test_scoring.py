"""Agreement of scores with the log-probabilities that the decoder computes token by token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.decoding.scoring import Scorer
from sdjax.models.params import init_params
from sdjax.testing import tiny_config

CONFIG = tiny_config(
    "qwen3",
    vocab_size=50,
    intermediate_size=32,
    num_heads=2,
    num_kv_heads=1,
    max_seq_len=24,
    eos_token_ids=(),
)
PROMPTS = [[3, 4, 5], [9], [11, 12, 13, 14, 15, 16]]


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: x * 9, init_params(CONFIG, jax.random.key(1), jnp.float32))


@pytest.fixture(scope="module")
def scorer():
    return Scorer(CONFIG, batch_size=2, buckets=(8, 16, 32))


def test_scores_equal_the_log_probabilities_of_decoding(params, scorer):
    decoder = Decoder(
        CONFIG, DecoderConfig(slots=4, prefill_batch=4, buckets=(8,), max_new_tokens=9)
    )
    completions = decoder.decode(params, None, PROMPTS, logprobs=True)
    texts = [(prompt, c.tokens) for prompt, c in zip(PROMPTS, completions, strict=True)]
    for score, completion in zip(scorer.score(params, None, texts), completions, strict=True):
        np.testing.assert_allclose(score.logprobs, completion.logprobs, atol=1e-4)
        assert score.greedy
        assert score.total == pytest.approx(sum(completion.logprobs), abs=1e-3)


def test_different_continuation_is_less_likely_and_not_greedy(params, scorer):
    (score,) = scorer.score(params, None, [([3, 4, 5], [7, 8, 7])])
    decoder = Decoder(
        CONFIG, DecoderConfig(slots=1, prefill_batch=1, buckets=(8,), max_new_tokens=3)
    )
    (greedy,) = decoder.decode(params, None, [[3, 4, 5]])
    assert greedy.tokens != (7, 8, 7)
    (greedy_score,) = scorer.score(params, None, [([3, 4, 5], greedy.tokens)])
    assert not score.greedy
    assert score.logprobs[0] <= greedy_score.logprobs[0]


def test_new_weights_do_not_recompile(params):
    scorer = Scorer(CONFIG, batch_size=2, buckets=(8, 16))
    texts = [(prompt, [5, 6, 7]) for prompt in PROMPTS]
    for scale in (1.0, 0.9, 1.1):
        scorer.score(jax.tree.map(lambda x, scale=scale: x * scale, params), None, texts)
    assert scorer._score_batch._cache_size() == 2


def test_invalid_text_does_not_affect_others(params, scorer):
    scores = scorer.score(params, None, [([], [3]), ([3], []), ([3] * 20, [4] * 5), ([3], [4])])
    assert [score.failure for score in scores] == [
        "the prompt or the continuation is empty",
        "the prompt or the continuation is empty",
        "the text has 25 tokens, more than the maximum of 24",
        None,
    ]
