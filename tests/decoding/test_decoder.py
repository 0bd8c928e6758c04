"""What a sequence is must not depend on who decodes beside it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.decoding.decoder import Decoder, DecoderSettings
from sdjax.decoding.sampling import Sampling
from sdjax.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.models.spec import initialise
from sdjax.models.transformer import forward, unembed

CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    context=64,
    tie_embeddings=True,
    eos_tokens=(1,),
)
SETTINGS = DecoderSettings(slots=4, rows=2, buckets=(8, 16), max_new_tokens=12)


@pytest.fixture(scope="module")
def params():
    # Wide weights, so that greedy choices vary and some sequences meet the end token.
    return jax.tree.map(lambda x: x * 12, initialise(CONFIG, jax.random.key(3), jnp.float32))


@pytest.fixture(scope="module")
def decoder():
    return Decoder(CONFIG, SETTINGS)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 61, rng.integers(1, 15)).tolist() for _ in range(13)]


@jax.jit
def next_token(params, tokens, length):
    """The greedy choice behind the first `length` of padded tokens, without a cache."""
    positions = jnp.arange(tokens.shape[0])[None]
    hidden, _ = forward(params, None, tokens[None], config=CONFIG, positions=positions)
    return unembed(params, hidden[0, length - 1], config=CONFIG).argmax()


def one_by_one(params, prompt, limit):
    """Greedy decoding that computes the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(limit):
        padded = np.zeros(32, np.int32)
        padded[: len(tokens)] = tokens
        token = int(next_token(params, padded, len(tokens)))
        if token in CONFIG.eos_tokens:
            return tuple(tokens[len(prompt) :]), True
        tokens.append(token)
    return tuple(tokens[len(prompt) :]), False


def test_greedy_equals_decoding_without_a_cache(params, decoder, prompts):
    for prompt, completion in zip(prompts, decoder.decode(params, None, prompts), strict=True):
        expected = one_by_one(params, prompt, SETTINGS.max_new_tokens)
        assert (completion.tokens, completion.stopped) == expected


def test_some_sequences_stop_and_some_reach_the_limit(params, decoder, prompts):
    """Otherwise the tests here would not see refilling at all."""
    stopped = [completion.stopped for completion in decoder.decode(params, None, prompts)]
    assert any(stopped)
    assert not all(stopped)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_a_sequence_is_the_same_in_any_company(params, decoder, prompts, temperature):
    sampling = Sampling(temperature=temperature)
    key = jax.random.key(5)
    together = decoder.decode(params, None, prompts, sampling=sampling, key=key)
    cut = decoder.decode(params, None, prompts[:5], sampling=sampling, key=key)
    assert together[:5] == cut


def test_samples_of_one_prompt_differ_by_their_index(params, decoder, prompts):
    sampling = Sampling(temperature=1.5, top_p=0.95)
    completions = decoder.decode(params, None, [prompts[0]] * 8, sampling=sampling)
    assert len({completion.tokens for completion in completions}) > 4


def test_three_models_compile_once(decoder, params, prompts):
    decoder.decode(params, None, prompts)
    before = (decoder._admit._cache_size(), decoder._advance._cache_size())
    for scale in (0.9, 1.1, 1.2):
        other = jax.tree.map(lambda x, scale=scale: x * scale, params)
        decoder.decode(other, None, prompts)
    assert (decoder._admit._cache_size(), decoder._advance._cache_size()) == before


def test_the_end_token_first_gives_an_empty_completion(params, prompts):
    first = one_by_one(params, prompts[0], 1)[0][0]
    stopping = Decoder(CONFIG, SETTINGS, stop_tokens=(first,))
    (completion,) = stopping.decode(params, None, [prompts[0]])
    assert completion.tokens == ()
    assert completion.stopped


def test_one_new_token(params, prompts):
    single = Decoder(CONFIG, replace(SETTINGS, max_new_tokens=1))
    for completion, prompt in zip(single.decode(params, None, prompts), prompts, strict=True):
        assert (completion.tokens, completion.stopped) == one_by_one(params, prompt, 1)


def test_bad_prompts_are_named(params, decoder):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        decoder.decode(params, None, [[3], []])
    with pytest.raises(UserError, match="prompt 0 has 17 tokens"):
        decoder.decode(params, None, [[3] * 17])
