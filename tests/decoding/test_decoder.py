"""Independence of generated sequences from the batch, the slots and the schedule."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.decoding import state
from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.decoding.sampling import Sampling
from sdjax.decoding.stopping import StopStrings
from sdjax.models.params import init_params
from sdjax.models.transformer import forward, unembed
from sdjax.sharding.mesh import make_mesh
from sdjax.testing import tiny_config, tiny_model, tiny_tokenizer

CONFIG = tiny_config(
    vocab_size=61, hidden_size=32, intermediate_size=48, max_seq_len=64, tie_embeddings=True
)
SIZES = DecoderConfig(slots=4, prefill_batch=2, buckets=(8, 16), max_new_tokens=12)


@pytest.fixture(scope="module")
def params():
    # Large weights, so that greedy tokens vary and some sequences reach the stop token.
    return jax.tree.map(lambda x: x * 12, init_params(CONFIG, jax.random.key(3), jnp.float32))


@pytest.fixture(scope="module")
def decoder():
    return Decoder(CONFIG, SIZES)


@pytest.fixture(scope="module")
def prompts():
    rng = np.random.default_rng(0)
    return [rng.integers(2, 61, rng.integers(1, 15)).tolist() for _ in range(13)]


@jax.jit
def next_token(params, tokens, length):
    """Return the greedy token after the first `length` of padded tokens, without a cache."""
    positions = jnp.arange(tokens.shape[0])[None]
    hidden, _ = forward(params, None, tokens[None], config=CONFIG, positions=positions)
    return unembed(params, hidden[0, length - 1], config=CONFIG).argmax()


def decode_without_cache(params, prompt, max_tokens):
    """Decode greedily, computing the whole sequence again for every token."""
    tokens = list(prompt)
    for _ in range(max_tokens):
        padded = np.zeros(32, np.int32)
        padded[: len(tokens)] = tokens
        token = int(next_token(params, padded, len(tokens)))
        if token in CONFIG.eos_token_ids:
            return tuple(tokens[len(prompt) :]), True
        tokens.append(token)
    return tuple(tokens[len(prompt) :]), False


def test_greedy_decoding_equals_decoding_without_cache(params, decoder, prompts):
    for prompt, completion in zip(prompts, decoder.decode(params, None, prompts), strict=True):
        expected = decode_without_cache(params, prompt, SIZES.max_new_tokens)
        assert (completion.tokens, completion.stopped) == expected


def test_some_sequences_stop_and_some_reach_the_limit(params, decoder, prompts):
    """Check that the other tests exercise refilling."""
    stopped = [completion.stopped for completion in decoder.decode(params, None, prompts)]
    assert any(stopped)
    assert not all(stopped)


@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_sequence_is_independent_of_the_batch(params, decoder, prompts, temperature):
    sampling = Sampling(temperature=temperature)
    key = jax.random.key(5)
    full_batch = decoder.decode(params, None, prompts, sampling=sampling, key=key)
    small_batch = decoder.decode(params, None, prompts[:5], sampling=sampling, key=key)
    assert full_batch[:5] == small_batch


def test_prefix_is_computed_once_and_does_not_change_results(params, decoder, prompts):
    """Check that sequences after a prefix are bit-identical in any batch."""
    prefix = tuple(prompts[0][:7])
    prefixed = [[*prefix, *prompt[:8]] for prompt in prompts]
    prefix_decoder = Decoder(CONFIG, replace(SIZES, buckets=(4, 8), prefix=prefix))
    completions = prefix_decoder.decode(params, None, prefixed)
    assert prefix_decoder.stats.prompt_tokens == sum(len(prompt[:8]) for prompt in prompts)
    for prompt, completion in zip(prefixed, completions, strict=True):
        expected = decode_without_cache(params, prompt, SIZES.max_new_tokens)
        assert (completion.tokens, completion.stopped) == expected
    assert prefix_decoder.decode(params, None, prefixed[::-1])[::-1] == completions
    assert prefix_decoder.decode(params, None, prefixed[3:6]) == completions[3:6]
    for prompt in (prompts[1], list(prefix)):
        (completion,) = prefix_decoder.decode(params, None, [prompt])
        assert "does not extend the decoder's prefix" in completion.failure


@pytest.mark.parametrize("token", [-1, 61])
def test_token_outside_the_vocabulary_is_a_failure(params, decoder, token):
    (completion,) = decoder.decode(params, None, [[5, token]])
    assert f"token {token} is outside the model's vocabulary of 61" in completion.failure


def test_samples_of_one_prompt_differ(params, decoder, prompts):
    sampling = Sampling(temperature=1.5, top_p=0.95)
    completions = decoder.decode(params, None, [prompts[0]] * 8, sampling=sampling)
    assert len({completion.tokens for completion in completions}) > 4


def test_new_weights_do_not_recompile(params, prompts):
    """Check for one executable per bucket plus two more, for any weights."""
    decoder = Decoder(CONFIG, SIZES)
    decoder.decode(params, None, prompts)
    functions = (decoder._prefill_prefix, decoder._prefill, decoder._decode_round)
    assert [f._cache_size() for f in functions] == [1, len(SIZES.buckets), 1]
    for scale in (0.9, 1.1, 1.2):
        scaled = jax.tree.map(lambda x, scale=scale: x * scale, params)
        decoder.decode(scaled, None, prompts)
    assert [f._cache_size() for f in functions] == [1, len(SIZES.buckets), 1]


def test_stop_token_as_first_token_gives_an_empty_completion(params, prompts):
    first_token = decode_without_cache(params, prompts[0], 1)[0][0]
    stopping_decoder = Decoder(CONFIG, SIZES, stop_token_ids=(first_token,))
    (completion,) = stopping_decoder.decode(params, None, [prompts[0]])
    assert completion.tokens == ()
    assert completion.stopped


def test_limit_of_one_new_token(params, prompts):
    short_decoder = Decoder(CONFIG, replace(SIZES, max_new_tokens=1))
    completions = short_decoder.decode(params, None, prompts)
    for completion, prompt in zip(completions, prompts, strict=True):
        assert (completion.tokens, completion.stopped) == decode_without_cache(params, prompt, 1)


def test_batch_of_one(params, decoder, prompts):
    expected = decode_without_cache(params, prompts[3], SIZES.max_new_tokens)
    (completion,) = decoder.decode(params, None, [prompts[3]])
    assert (completion.tokens, completion.stopped) == expected


def test_results_are_independent_of_the_order(params, decoder, prompts):
    reversed_batch = decoder.decode(params, None, prompts[::-1])[::-1]
    assert reversed_batch == decoder.decode(params, None, prompts)


def test_invalid_prompt_does_not_affect_others(params, decoder, prompts):
    good = decoder.decode(params, None, prompts[:2])
    mixed = decoder.decode(params, None, [prompts[0], [], [3] * 17, prompts[1]])
    assert [mixed[0], mixed[3]] == good
    assert mixed[1].failure == "the prompt is empty: a model needs at least one token"
    assert mixed[2].failure == "the prompt has 17 tokens, more than the maximum of 16"


def test_prompt_as_long_as_the_context_gets_one_token(params, decoder):
    short_decoder = Decoder(replace(CONFIG, max_seq_len=16), SIZES)
    prompts = [[7] * 16, [7] * 14]
    completions = short_decoder.decode(params, None, prompts)
    unlimited = decoder.decode(params, None, prompts)
    assert [len(completion.tokens) for completion in completions] == [1, 3]
    assert [c.tokens for c in completions] == [
        u.tokens[: len(c.tokens)] for c, u in zip(completions, unlimited, strict=True)
    ]


def test_samples_of_a_prompt_share_its_prefill(params, decoder, prompts):
    """Check that each sample equals the one decoded separately."""
    sampling, key = Sampling(temperature=1.2), jax.random.key(9)
    repeated = [prompts[index] for index in (0, 1, 0, 2, 1, 0, 0, 0, 2, 0, 1)]
    completions = decoder.decode(params, None, repeated, sampling=sampling, key=key)
    assert decoder.stats.prompts == 3
    for index in (0, 4, 9, 10):
        (separate,) = decoder.decode(
            params, None, [repeated[index]], sampling=sampling, key=key, sample_ids=[index]
        )
        assert separate == completions[index]


def test_logprobs_equal_those_of_the_model(params, decoder, prompts):
    """Check that log-probabilities equal the log-softmax of the logits at any temperature."""
    sampling = Sampling(temperature=0.7, top_k=5)
    (completion,) = decoder.decode(params, None, [prompts[2]], sampling=sampling, logprobs=True)
    tokens = jnp.asarray([*prompts[2], *completion.tokens])[None]
    hidden, _ = forward(
        params, None, tokens, config=CONFIG, positions=jnp.arange(tokens.size)[None]
    )
    expected = jax.nn.log_softmax(unembed(params, hidden, config=CONFIG)[0])
    start = len(prompts[2]) - 1
    token_logprobs = [expected[start + n, token] for n, token in enumerate(completion.tokens)]
    assert len(token_logprobs) > 2
    np.testing.assert_allclose(completion.logprobs, token_logprobs, atol=1e-4)


def to_letters(tokens):
    return "".join(chr(ord("A") + token % 26) for token in tokens)


def test_stop_string_truncates_the_text(params, prompts):
    """Check that the tokens do not depend on when the stop string is found."""
    decoder = Decoder(CONFIG, replace(SIZES, max_new_tokens=40), stop_token_ids=())
    untruncated = decoder.decode(params, None, prompts)
    strings = (to_letters(untruncated[0].tokens[5:7]), to_letters(untruncated[1].tokens[30:32]))
    stop_strings = StopStrings(strings=strings, decode=to_letters)
    truncated = decoder.decode(params, None, prompts, stop_strings=stop_strings)
    assert decoder.stats.new_tokens < 40 * len(prompts)
    for completion, full in zip(truncated, untruncated, strict=True):
        text = to_letters(full.tokens)
        ends = [text.index(string) for string in strings if string in text]
        assert completion.text == (text[: min(ends)] if ends else text)
        assert completion.stopped == bool(ends)
        assert completion.tokens == full.tokens[: min(ends) + 2 if ends else None]


def test_key_cache_has_the_tpu_layout(params, decoder, prompts, monkeypatch):
    monkeypatch.setattr(state, "TRANSPOSED_KEY_PLATFORMS", ("cpu",))
    tpu_decoder = Decoder(CONFIG, SIZES, mesh=make_mesh({"data": 1}, devices=jax.devices()[:1]))
    new_state = tpu_decoder._prefill_prefix(False, params, None, np.zeros(0, np.int32))
    assert new_state.cache[0]["k"].format.layout.major_to_minor == (0, 1, 3, 2)
    assert tpu_decoder.decode(params, None, prompts) == decoder.decode(params, None, prompts)


def test_stats_count_the_work(params, decoder, prompts):
    completions = decoder.decode(params, None, prompts)
    stats = decoder.stats
    assert stats.prompt_tokens == sum(map(len, prompts))
    assert stats.new_tokens == sum(len(c.tokens) + c.stopped for c in completions)
    assert stats.slot_steps == SIZES.slots * stats.steps
    assert 0.5 < stats.occupancy <= 1


def test_generate_returns_texts():
    model_config, params = tiny_model()
    decoder = Decoder(model_config, SIZES, tokenizer=tiny_tokenizer())
    completions = decoder.generate(params, ["1+1=", "hello"], logprobs=True)
    for completion in completions:
        assert completion.text == tiny_tokenizer().decode(completion.tokens)
        assert len(completion.logprobs) == len(completion.tokens)
    text = completions[0].text
    (truncated,) = decoder.generate(params, ["1+1="], stop=[text[2:4]])
    assert truncated.text == text[: text.index(text[2:4])]


def test_generate_without_tokenizer_or_with_long_prompt_raises_user_error():
    model_config, params = tiny_model()
    with pytest.raises(UserError, match="pass tokenizer="):
        Decoder(model_config).generate(params, ["a"])
    decoder = Decoder(model_config, SIZES, tokenizer=tiny_tokenizer())
    with pytest.raises(UserError, match="prompt 1: the prompt has 17 tokens"):
        decoder.generate(params, ["a", "a" * 17])
