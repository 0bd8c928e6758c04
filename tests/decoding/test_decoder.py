"""What a sequence is must not depend on who decodes beside it."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from pydantic import ValidationError

from sdjax.core.errors import UserError
from sdjax.decoding import state
from sdjax.decoding.config import DecoderConfig, common_prefix
from sdjax.decoding.decoder import Decoder
from sdjax.decoding.sampling import Sampling
from sdjax.decoding.stopping import StopStrings
from sdjax.models.config import ModelConfig
from sdjax.models.params import init_params
from sdjax.models.transformer import forward, unembed
from sdjax.sharding.mesh import make_mesh

CONFIG = ModelConfig(
    family="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=8,
    max_seq_len=64,
    tie_embeddings=True,
    eos_token_ids=(1,),
)
SETTINGS = DecoderConfig(slots=4, prefill_batch=2, buckets=(8, 16), max_new_tokens=12)


@pytest.fixture(scope="module")
def params():
    # Wide weights, so that greedy choices vary and some sequences meet the end token.
    return jax.tree.map(lambda x: x * 12, init_params(CONFIG, jax.random.key(3), jnp.float32))


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
        if token in CONFIG.eos_token_ids:
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


def test_a_prefix_is_computed_once_and_changes_nothing(params, decoder, prompts):
    """Behind it, sequences are bit-equal in any company, as without one."""
    shared = tuple(prompts[0][:7])
    behind = [[*shared, *prompt[:8]] for prompt in prompts]
    settings = replace(SETTINGS, buckets=(4, 8), prefix=shared)
    ahead = Decoder(CONFIG, settings)
    found = ahead.decode(params, None, behind)
    assert ahead.work.prompt_tokens == sum(len(prompt[:8]) for prompt in prompts)
    for prompt, completion in zip(behind, found, strict=True):
        expected = one_by_one(params, prompt, SETTINGS.max_new_tokens)
        assert (completion.tokens, completion.stopped) == expected
    assert ahead.decode(params, None, behind[::-1])[::-1] == found
    assert ahead.decode(params, None, behind[3:6]) == found[3:6]
    other, only = ahead.decode(params, None, [prompts[1], list(shared)])
    assert "does not go on from the decoder's prefix" in other.failure
    assert "does not go on from the decoder's prefix" in only.failure


@pytest.mark.parametrize("token", [-1, 61])
def test_a_token_that_the_model_lacks_is_a_failure(params, decoder, token):
    (completion,) = decoder.decode(params, None, [[5, token]])
    assert f"token {token} is none of the model's 61" in completion.failure


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: replace(SETTINGS, buckets=(0, 8)),
        lambda: replace(SETTINGS, max_new_tokens=0),
        lambda: Sampling(temperature=float("nan")),
        lambda: StopStrings(strings=("a", ""), text_of=str),
    ],
)
def test_settings_that_decode_nothing_are_refused(wrong):
    with pytest.raises((UserError, ValidationError)):
        wrong()


def test_the_common_prefix_leaves_each_prompt_a_token():
    assert common_prefix([[5, 6, 7], [5, 6, 8, 9]]) == (5, 6)
    assert common_prefix([[5, 6], [5, 6, 8]]) == (5,)
    assert common_prefix([[5], [6]]) == ()


def test_samples_of_one_prompt_differ_by_their_index(params, decoder, prompts):
    sampling = Sampling(temperature=1.5, top_p=0.95)
    completions = decoder.decode(params, None, [prompts[0]] * 8, sampling=sampling)
    assert len({completion.tokens for completion in completions}) > 4


def test_three_models_compile_once(params, prompts):
    """Three programs for one bucket, one more for each further one, none for other weights."""
    fresh = Decoder(CONFIG, SETTINGS)
    fresh.decode(params, None, prompts)
    programs = (fresh._begin, fresh._admit, fresh._advance)
    assert [program._cache_size() for program in programs] == [1, len(SETTINGS.buckets), 1]
    for scale in (0.9, 1.1, 1.2):
        other = jax.tree.map(lambda x, scale=scale: x * scale, params)
        fresh.decode(other, None, prompts)
    assert [program._cache_size() for program in programs] == [1, len(SETTINGS.buckets), 1]


def test_the_end_token_first_gives_an_empty_completion(params, prompts):
    first = one_by_one(params, prompts[0], 1)[0][0]
    stopping = Decoder(CONFIG, SETTINGS, stop_token_ids=(first,))
    (completion,) = stopping.decode(params, None, [prompts[0]])
    assert completion.tokens == ()
    assert completion.stopped


def test_one_new_token(params, prompts):
    single = Decoder(CONFIG, replace(SETTINGS, max_new_tokens=1))
    for completion, prompt in zip(single.decode(params, None, prompts), prompts, strict=True):
        assert (completion.tokens, completion.stopped) == one_by_one(params, prompt, 1)


def test_a_batch_of_one(params, decoder, prompts):
    expected = one_by_one(params, prompts[3], SETTINGS.max_new_tokens)
    (completion,) = decoder.decode(params, None, [prompts[3]])
    assert (completion.tokens, completion.stopped) == expected


def test_order_does_not_matter(params, decoder, prompts):
    backwards = decoder.decode(params, None, prompts[::-1])[::-1]
    assert backwards == decoder.decode(params, None, prompts)


def test_a_bad_prompt_fails_alone(params, decoder, prompts):
    good = decoder.decode(params, None, prompts[:2])
    mixed = decoder.decode(params, None, [prompts[0], [], [3] * 17, prompts[1]])
    assert [mixed[0], mixed[3]] == good
    assert mixed[1].failure == "the prompt is empty: a model needs at least one token"
    assert mixed[2].failure == "the prompt has 17 tokens, of which at most 16 fit"


def test_a_prompt_as_long_as_the_context_gets_one_token(params, decoder):
    short = Decoder(replace(CONFIG, max_seq_len=16), SETTINGS)
    full, nearly = [[7] * 16, [7] * 14]
    completions = short.decode(params, None, [full, nearly])
    unlimited = decoder.decode(params, None, [full, nearly])
    assert [len(completion.tokens) for completion in completions] == [1, 3]
    assert [c.tokens for c in completions] == [
        u.tokens[: len(c.tokens)] for c, u in zip(completions, unlimited, strict=True)
    ]


def test_samples_of_a_prompt_compute_it_once(params, decoder, prompts):
    """And are what each would be alone."""
    sampling, key = Sampling(temperature=1.2), jax.random.key(9)
    asked = [prompts[index] for index in (0, 1, 0, 2, 1, 0, 0, 0, 2, 0, 1)]
    together = decoder.decode(params, None, asked, sampling=sampling, key=key)
    assert decoder.work.prompts == 3
    for number in (0, 4, 9, 10):
        (alone,) = decoder.decode(
            params, None, [asked[number]], sampling=sampling, key=key, numbers=[number]
        )
        assert alone == together[number]


def test_logprobs_are_the_models_own(params, decoder, prompts):
    """Whatever the temperature: the log-softmax of the logits, at the produced tokens."""
    sampling = Sampling(temperature=0.7, top_k=5)
    (completion,) = decoder.decode(params, None, [prompts[2]], sampling=sampling, logprobs=True)
    tokens = jnp.asarray([*prompts[2], *completion.tokens])[None]
    hidden, _ = forward(
        params, None, tokens, config=CONFIG, positions=jnp.arange(tokens.size)[None]
    )
    expected = jax.nn.log_softmax(unembed(params, hidden, config=CONFIG)[0])
    start = len(prompts[2]) - 1
    picked = [expected[start + n, token] for n, token in enumerate(completion.tokens)]
    assert len(picked) > 2
    np.testing.assert_allclose(completion.logprobs, picked, atol=1e-4)


def spelled(tokens):
    return "".join(chr(ord("A") + token % 26) for token in tokens)


def test_a_stop_string_cuts_the_text(params, prompts):
    """The same tokens come first, whether the string is seen at once or rounds later."""
    plain = Decoder(CONFIG, replace(SETTINGS, max_new_tokens=40), stop_token_ids=())
    whole = plain.decode(params, None, prompts)
    strings = (spelled(whole[0].tokens[5:7]), spelled(whole[1].tokens[30:32]))
    stopping = StopStrings(strings=strings, text_of=spelled)
    cut = plain.decode(params, None, prompts, stop_strings=stopping)
    assert plain.work.new_tokens < 40 * len(prompts)
    for one, full in zip(cut, whole, strict=True):
        text = spelled(full.tokens)
        ends = [text.index(string) for string in strings if string in text]
        assert one.text == (text[: min(ends)] if ends else text)
        assert one.stopped == bool(ends)
        assert one.tokens == full.tokens[: min(ends) + 2 if ends else None]


def test_keys_lie_in_memory_as_a_tpu_has_them(params, decoder, prompts, monkeypatch):
    monkeypatch.setattr(state, "KEYS_TURNED", ("cpu",))
    turned = Decoder(CONFIG, SETTINGS, mesh=make_mesh({"data": 1}, devices=jax.devices()[:1]))
    seen = turned._begin(False, params, None, np.zeros(0, np.int32))
    assert seen.cache[0]["k"].format.layout.major_to_minor == (0, 1, 3, 2)
    assert turned.decode(params, None, prompts) == decoder.decode(params, None, prompts)


def test_work_is_counted(params, decoder, prompts):
    completions = decoder.decode(params, None, prompts)
    work = decoder.work
    assert work.prompt_tokens == sum(map(len, prompts))
    assert work.new_tokens == sum(len(c.tokens) + c.stopped for c in completions)
    assert work.slot_steps == SETTINGS.slots * work.steps
    assert 0.5 < work.occupancy <= 1
