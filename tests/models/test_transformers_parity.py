"""Parity of logits with transformers (1e-4 in float32), on tiny random models of every family."""

import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from transformers import AutoModelForCausalLM

from sdjax.io.hf_checkpoint import load_model, write_model
from sdjax.models.families import FAMILIES
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten

torch = pytest.importorskip("torch", reason="needs torch, the reference of the parity tests")

TOLERANCE = 1e-4
VOCAB = 61
LENGTH = 16
WINDOW = 5  # about a third of the sequence

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,  # large, so that attention is far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
# The sequences are longer than the original context, so that the long factors are used.
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0, 1.1, 1.2],
    "long_factor": [1.0, 2.0, 3.0],
}
GEMMA = {"head_dim": 10, "sliding_window": WINDOW, "query_pre_attn_scalar": 7}
VARIANTS = {
    "llama_mha": ("Llama", {"num_key_value_heads": 4}),
    "llama_mqa_tied": ("Llama", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama_head_dim": ("Llama", {"head_dim": 6, "rope_parameters": LLAMA3}),
    "mistral_full": ("Mistral", {"sliding_window": None}),
    "mistral_window": ("Mistral", {"sliding_window": WINDOW}),
    "qwen2_tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2_window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"head_dim": 10}),
    "gemma2": ("Gemma2", {**GEMMA, "attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": ("Gemma3Text", {**GEMMA, "layer_types": ["sliding_attention", "full_attention"]}),
    "phi3": ("Phi3", {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5}}),
    "phi3_longrope_window": (
        "Phi3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": LONGROPE,
            "original_max_position_embeddings": 8,
        },
    ),
}


@pytest.fixture(params=VARIANTS, scope="module")
def model(request, tmp_path_factory):
    """Return the torch model, and our config and parameters read from its saved folder."""
    name, changes = VARIANTS[request.param]
    config_class = getattr(transformers, f"{name}Config")
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        config_class(**{**BASE, **changes}), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for parameter_name, tensor in theirs.named_parameters():
            # transformers initializes them to one or zero, which would hide errors.
            if "norm" in parameter_name or "bias" in parameter_name:
                tensor.add_(torch.empty_like(tensor).uniform_(-0.5, 0.5))
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    config, params = load_model(folder)
    return theirs, config, params


def test_all_families_are_covered():
    model_types = {
        getattr(transformers, f"{name}Config").model_type for name, _ in VARIANTS.values()
    }
    assert model_types == set(FAMILIES)


def tokens(batch: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


# Each of about forty executables runs once or twice, so compile time dominates.
@functools.partial(
    jax.jit,
    static_argnames=("config", "max_length"),
    compiler_options={"xla_backend_optimization_level": 0},
)
def run(params, ids, positions, segments, cache, *, config, max_length):
    hidden, cache = forward(
        params,
        None,
        ids,
        config=config,
        positions=positions,
        segments=segments,
        cache=cache,
        max_length=max_length,
    )
    return unembed(params, hidden, config=config), cache


def default_positions(batch: int, length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(length), (batch, length))


def logits_of(theirs, ids, **arguments) -> np.ndarray:
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(ids), **arguments).logits.numpy()


def our_logits(config, params, ids, positions=None, *, segments=None, cache=None, max_length=None):
    if positions is None:
        positions = default_positions(*ids.shape)
    ids, positions = jnp.asarray(ids), jnp.asarray(positions)
    logits, cache = run(
        params, ids, positions, segments, cache, config=config, max_length=max_length
    )
    return np.asarray(logits), cache


def test_logits_with_left_and_right_padding(model):
    """Check left padding as a separate segment, with positions counted from the text's start.

    Right padding is never attended to.
    """
    theirs, config, params = model
    ids = tokens(4)
    lengths, left = np.array([LENGTH, 11, 4, 9]), np.array([0, LENGTH - 11, LENGTH - 4, 0])
    positions = np.maximum(np.arange(LENGTH) - left[:, None], 0)
    valid = (np.arange(LENGTH) >= left[:, None]) & (positions < lengths[:, None])
    found, _ = our_logits(config, params, ids, positions, segments=valid.astype(np.int32))
    expected = logits_of(
        theirs,
        ids,
        attention_mask=torch.tensor(valid.astype(int)),
        position_ids=torch.tensor(positions),
    )
    assert np.ptp(expected[valid]) > 1  # not a degenerate model
    np.testing.assert_allclose(found[valid], expected[valid], atol=TOLERANCE)


def test_decoding_after_prefill(model):
    """Decode rows with different prompt lengths into one cache, one token at a time."""
    theirs, config, params = model
    ids = tokens(3)
    expected = logits_of(theirs, ids)
    lengths = np.array([6, 9, 3])
    rows = np.arange(3)
    # Tokens after a prompt are never read.
    prompts = np.where(np.arange(LENGTH) < lengths[:, None], ids, VOCAB - 1)
    prefill, entries = our_logits(config, params, prompts, max_length=LENGTH + 4)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(prefill[row, :length], expected[row, :length], atol=TOLERANCE)
    cache = [
        {
            "k": np.pad(entry["k"], ((0, 0), (0, 0), (0, 0), (0, 4))),
            "v": np.pad(entry["v"], ((0, 0), (0, 0), (0, 4), (0, 0))),
        }
        for entry in entries
    ]
    for step in range(LENGTH - lengths.max()):
        positions = lengths + step
        found, cache = our_logits(
            config, params, ids[rows, positions][:, None], positions[:, None], cache=cache
        )
        np.testing.assert_allclose(found[:, 0], expected[rows, positions], atol=TOLERANCE)


def test_written_bfloat16_models_equal_transformers_bit_for_bit(model, tmp_path):
    """Check that our folder has the same bits, and that transformers reads the same model."""
    theirs, config, _ = model
    # A copy, because converting the model in place would also round its rotary frequencies.
    rounded = copy.deepcopy(theirs).to(torch.bfloat16)
    rounded.save_pretrained(tmp_path / "theirs")
    found_config, params = load_model(tmp_path / "theirs")
    assert found_config == config
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    write_model(tmp_path / "ours", config, params)
    restored_config, restored = load_model(tmp_path / "ours")
    assert restored_config == config
    for path, leaf in flatten(params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(flatten(restored)[path]).tobytes()
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours",
        attn_implementation="eager",
        dtype=torch.float32,
        output_loading_info=True,
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(loaded) is type(theirs)
    assert loaded.state_dict().keys() == rounded.state_dict().keys()
    for name, tensor in rounded.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.float()), name
    theirs.load_state_dict(loaded.state_dict())
    ids = tokens(2)
    np.testing.assert_array_equal(logits_of(loaded.eval(), ids), logits_of(theirs, ids))


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory):
    """Return a model with both layer types and both rotary embeddings."""
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        transformers.Gemma3TextConfig(**{**BASE, **VARIANTS["gemma3"][1]}),
        attn_implementation="eager",
        dtype=torch.float32,
    ).eval()
    folder = tmp_path_factory.mktemp("gemma3")
    theirs.save_pretrained(folder)
    return theirs, *load_model(folder)


def test_prefill_in_two_chunks(gemma3):
    theirs, config, params = gemma3
    ids = tokens(2)
    expected = logits_of(theirs, ids)
    zeros = np.zeros((2, config.num_kv_heads, LENGTH, config.head_dim), np.float32)
    cache = [{"k": zeros.mT, "v": zeros} for _ in range(config.num_layers)]
    found = []
    for start, stop in ((0, 8), (8, LENGTH)):
        positions = default_positions(2, LENGTH)[:, start:stop]
        chunk, cache = our_logits(config, params, ids[:, start:stop], positions, cache=cache)
        found.append(chunk)
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=TOLERANCE)


def test_packed_segments_equal_separate_sequences(gemma3):
    theirs, config, params = gemma3
    sequences = (tokens(3, 7, 1), tokens(3, 4, 2), tokens(3, 5, 3))
    sizes = [sequence.shape[1] for sequence in sequences]
    positions = np.concatenate([default_positions(3, size) for size in sizes], 1)
    segments = np.broadcast_to(np.repeat(np.arange(3), sizes), (3, LENGTH)).astype(np.int32)
    packed, _ = our_logits(
        config, params, np.concatenate(sequences, 1), positions, segments=segments
    )
    expected = np.concatenate([logits_of(theirs, sequence) for sequence in sequences], 1)
    np.testing.assert_allclose(packed, expected, atol=TOLERANCE)
