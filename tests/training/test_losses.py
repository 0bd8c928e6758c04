"""Log-probabilities, SFT loss and DPO on a tiny model."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.models.lora import init_adapter, shard_adapter
from sdjax.models.params import init_params
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten
from sdjax.sharding.mesh import make_mesh
from sdjax.testing import count_compilations, tiny_config
from sdjax.training import logprobs as logprobs_module
from sdjax.training.api import train_dpo
from sdjax.training.config import DPOConfig, OptimizerConfig
from sdjax.training.dpo import TokenPair, pad_pairs, reference_logprobs, sequence_logprobs
from sdjax.training.fit import compile_step
from sdjax.training.jit_cache import JitCache
from sdjax.training.logprobs import token_logprobs
from sdjax.training.losses import LOSSES, MAX_EXPONENT, forward_kl_loss
from sdjax.training.packing import Example, bucket_size, pack, target_batches
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import full_finetune, lora_finetune, split_params

CONFIG = tiny_config(
    vocab_size=37, num_heads=2, num_kv_heads=1, max_seq_len=128, tie_embeddings=True
)
SETTINGS = DPOConfig(beta=0.1, learning_rate=3e-3, batch_size=2, max_steps=40)


def pair(prompt, chosen, rejected):
    return TokenPair(
        chosen=Example(prompt=prompt, target=chosen),
        rejected=Example(prompt=prompt, target=rejected),
    )


PAIRS = [
    pair((3, 4), (5, 6, 1), (7, 1)),
    pair((3, 4), (5, 8, 9, 1), (7, 7, 1)),
    pair((2,), (5, 1), (7, 10, 11, 1)),
]


@pytest.fixture(scope="module")
def params():
    return init_params(CONFIG, jax.random.key(0), jnp.float32)


@pytest.fixture(scope="module")
def adapter():
    return init_adapter(CONFIG, jax.random.key(1), rank=4, alpha=8)


JITS = JitCache()  # shared by the tests, as it is by the rounds of a run


def dpo(params, adapter, pairs, settings, seed=0):
    trainable = lora_finetune(CONFIG, params, adapter)
    factors, history = train_dpo(
        trainable, pairs, settings, key=jax.random.key(seed), jit_cache=JITS
    )
    return replace(adapter, factors=factors), history


@jax.jit
def logits_of(params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = forward(params, None, tokens, config=CONFIG, positions=positions)
    return unembed(params, hidden, config=CONFIG)


def full_logprobs(params, tokens):
    """Log-softmax over the full vocabulary, in float64."""
    padded = np.zeros((len(tokens), 16), np.int32)
    padded[:, : tokens.shape[1]] = tokens
    logits = np.asarray(logits_of(params, padded), np.float64)[:, : tokens.shape[1] - 1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return np.take_along_axis(logprobs, tokens[:, 1:, None], axis=-1)[..., 0]


@pytest.mark.parametrize("logits", [300, 1 << 24])
def test_token_logprobs_equal_log_softmax(params, monkeypatch, logits):
    monkeypatch.setattr(logprobs_module, "MAX_LOGITS", logits)
    tokens = np.random.default_rng(0).integers(0, 37, (3, 11))
    positions = jnp.broadcast_to(jnp.arange(11), tokens.shape)
    found = token_logprobs(params, None, jnp.asarray(tokens), config=CONFIG, positions=positions)
    np.testing.assert_allclose(found, full_logprobs(params, tokens), rtol=1e-5, atol=1e-5)


def test_sft_loss_equals_mean_over_unpacked_targets(params):
    examples = [Example(prompt=(3, 4), target=(5, 1)), Example(prompt=(6,), target=(7, 8, 1))]
    trainable, frozen = split_params(params, {"embed", "final_norm"})
    value, metrics = sft_loss(CONFIG)(trainable, frozen, pack(examples, 12))
    expected = []
    for example in examples:
        tokens = np.array([example.prompt + example.target])
        expected.extend(-full_logprobs(params, tokens)[0, len(example.prompt) - 1 :])
    np.testing.assert_allclose(value, np.mean(expected), rtol=1e-5)
    assert metrics["tokens"] == 5


def test_sequence_logprobs_include_end_token_but_not_prompt(params):
    (batch,) = target_batches(pad_pairs(PAIRS, CONFIG.max_seq_len), [np.arange(3)])
    assert batch["target_index"].shape == batch["weights"].shape == (1, 64)
    found = sequence_logprobs(CONFIG, params, None, batch)
    for index, one in enumerate(PAIRS):
        for side, text in enumerate((one.chosen, one.rejected)):
            tokens = np.array([text.prompt + text.target])
            expected = full_logprobs(params, tokens)[0, len(text.prompt) - 1 :].sum()
            np.testing.assert_allclose(found[index, side], expected, rtol=1e-5)


def test_dpo_starts_at_log_2_and_widens_the_margin(params, adapter):
    trained, history = dpo(params, adapter, PAIRS, SETTINGS)
    assert history[0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert history[-1]["rewards/margins"] > 0.1
    assert history[-1]["rewards/accuracies"] == 1.0
    (batch,) = target_batches(pad_pairs(PAIRS, CONFIG.max_seq_len), [np.arange(3)])
    before = sequence_logprobs(CONFIG, params, adapter, batch)
    after = sequence_logprobs(CONFIG, params, trained, batch)
    assert np.all((after[:, 0] - after[:, 1]) > (before[:, 0] - before[:, 1]))


def test_rounds_share_compiled_functions(params, adapter):
    once, _ = dpo(params, adapter, PAIRS, SETTINGS)
    others = [PAIRS[2], PAIRS[0], pair((2, 3, 4), (5, 1), (7, 8, 9, 10, 11, 1))]
    with count_compilations() as compilations:
        shared, history = dpo(params, once, others, replace(SETTINGS, max_steps=7))
    assert compilations.count == 0
    trainable = lora_finetune(CONFIG, params, once)
    alone, expected = train_dpo(
        trainable, others, replace(SETTINGS, max_steps=7), key=jax.random.key(0)
    )
    assert history == expected
    jax.tree.map(np.testing.assert_array_equal, shared.factors, alone)


def test_decaying_learning_rate_depends_on_the_number_of_steps():
    short, long = (
        OptimizerConfig(max_steps=steps, learning_rate=1.0, min_lr_ratio=0.1) for steps in (2, 20)
    )
    cache = JitCache()
    steps = {
        config: compile_step(sft_loss(CONFIG), config, jit_cache=cache)[1]
        for config in (short, long)
    }
    assert steps[short] is not steps[long]


def test_reference_is_computed_once_per_distinct_completion(params):
    """Check nine pairs of three chosen and three rejected completions, in batches of two pairs."""
    calls = []

    class CountingCache(JitCache):
        def jit(self, function, **options):
            jitted = super().jit(function, **options)

            def counted(*arguments):
                calls.append(arguments)
                return jitted(*arguments)

            return counted

    pairs = [
        TokenPair(chosen=one.chosen, rejected=other.rejected) for one in PAIRS for other in PAIRS
    ]
    data = pad_pairs(pairs, CONFIG.max_seq_len)
    trainable = full_finetune(CONFIG, params)
    found = reference_logprobs(trainable, data, SETTINGS, jit_cache=CountingCache())
    assert len(calls) == 2  # of six completions; five without sharing
    for index, one in enumerate(pairs):
        for side, text in enumerate((one.chosen, one.rejected)):
            tokens = np.array([text.prompt + text.target])
            expected = full_logprobs(params, tokens)[0, len(text.prompt) - 1 :].sum()
            np.testing.assert_allclose(found[index, side], expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("size", "expected"),
    [(1, 64), (64, 64), (65, 128), (129, 192), (513, 640), (1205, 1280), (1235, 1280)],
)
def test_sizes_are_rounded_up_to_buckets(size, expected):
    assert bucket_size(size) == expected


def test_second_round_starts_at_log_2_against_its_own_start(params, adapter):
    """Check the reference: the policy at the start of the round, or the seed if configured."""
    once, _ = dpo(params, adapter, PAIRS, SETTINGS)
    _, history = dpo(params, once, PAIRS, SETTINGS, seed=1)
    assert history[0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-6)
    against_seed = replace(SETTINGS, reference="seed")
    _, history = dpo(params, once, PAIRS, against_seed, seed=1)
    assert history[0]["dpo_loss"] < np.log(2) - 0.01


def test_nll_loss_is_the_mean_over_chosen_tokens(params, adapter):
    settings = replace(SETTINGS, nll_weight=0.5, max_steps=1, batch_size=3)
    _, history = dpo(params, adapter, PAIRS, settings)
    expected = history[0]["dpo_loss"] + 0.5 * history[0]["nll_loss"]
    assert history[0]["loss"] == pytest.approx(expected, rel=1e-6)
    likelihoods = []
    for one in PAIRS:
        tokens = np.array([one.chosen.prompt + one.chosen.target])
        logprobs = full_logprobs(params, tokens)[0, len(one.chosen.prompt) - 1 :]
        likelihoods.append(-logprobs.mean())
    assert history[0]["nll_loss"] == pytest.approx(np.mean(likelihoods), rel=1e-5)


def test_invalid_pairs_raise_user_error(params, adapter):
    with pytest.raises(UserError, match="no preference pairs"):
        dpo(params, adapter, [], SETTINGS)
    long = pair((3,), (4,) * 200, (5,))
    with pytest.raises(UserError, match="201 tokens"):
        dpo(params, adapter, [long], SETTINGS)


def test_non_finite_loss_raises_user_error_with_step(params, adapter):
    broken = jax.tree.map(lambda x: x * jnp.nan, params)
    with pytest.raises(UserError, match="the loss is nan at step 1"):
        dpo(broken, adapter, PAIRS, SETTINGS)


def test_trained_factors_keep_their_sharding(params, adapter):
    mesh = make_mesh({"tensor": 1}, devices=jax.devices()[:1])
    placed = shard_adapter(adapter, CONFIG, mesh)
    trained, _ = dpo(params, placed, PAIRS, replace(SETTINGS, max_steps=2), seed=3)
    for path, leaf in flatten(trained.factors).items():
        assert leaf.sharding == flatten(placed.factors)[path].sharding


def test_losses_equal_the_papers_equations():
    """Check each loss against NumPy in float64; the sums of TRL 1.16 are the same."""
    rng = np.random.default_rng(0)
    log_ratios = rng.normal(0, 3, (5, 2))
    lengths = rng.integers(1, 9, (5, 2)).astype(float)
    margin = log_ratios[:, 0] - log_ratios[:, 1]
    per_token = log_ratios / lengths
    correct, swapped = np.log1p(np.exp(-0.3 * margin)), np.log1p(np.exp(0.3 * margin))
    powers = np.exp(-log_ratios)
    expected = {
        "sigmoid": correct,
        "ipo": (per_token[:, 0] - per_token[:, 1] - 1 / 0.6) ** 2,
        "robust": (0.8 * correct - 0.2 * swapped) / 0.6,
        "forward_kl": np.logaddexp(0, -0.3 * (powers[:, 1] - powers[:, 0])),
    }
    assert expected.keys() == LOSSES.keys()
    for name, values in expected.items():
        found = LOSSES[name](jnp.asarray(log_ratios), jnp.asarray(lengths), 0.3, 0.2)
        np.testing.assert_allclose(found, values, rtol=1e-5, err_msg=name)


def test_forward_kl_stays_finite_for_completions_that_became_improbable():
    def total(log_ratios):
        return forward_kl_loss(log_ratios, jnp.ones((1, 2)), 0.4, 0.0).sum()

    for chosen, rejected in ((-500.0, 0.0), (0.0, -500.0), (-500.0, -500.0)):
        value, gradient = jax.value_and_grad(total)(jnp.array([[chosen, rejected]]))
        assert np.isfinite(value)
        assert np.isfinite(np.square(1e6 * np.asarray(gradient, np.float32))).all()
    # a chosen completion is pulled back in proportion to what it lost
    weak, strong = (
        jax.grad(total)(jnp.array([[lost, 0.0]]))[0, 0] for lost in (-10.0, -MAX_EXPONENT + 1)
    )
    np.testing.assert_allclose(strong / weak, np.exp(MAX_EXPONENT - 11), rtol=1e-4)


def test_ipo_starts_at_its_target_margin_and_trains(params, adapter):
    ipo = replace(SETTINGS, loss="ipo", max_steps=10)
    _, history = dpo(params, adapter, PAIRS, ipo)
    assert history[0]["dpo_loss"] == pytest.approx((1 / (2 * ipo.beta)) ** 2, rel=1e-5)
    assert history[-1]["loss"] < history[0]["loss"]


def test_full_finetuning_uses_initial_weights_as_reference(params):
    trainable = full_finetune(CONFIG, jax.tree.map(jnp.copy, params))
    trained, history = train_dpo(
        trainable, PAIRS, replace(SETTINGS, max_steps=5), key=jax.random.key(0)
    )
    assert history[0]["dpo_loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert history[-1]["loss"] < history[0]["loss"]
    before, after = flatten(params), trained
    assert all(np.any(np.asarray(before[path]) != np.asarray(after[path])) for path in before)
