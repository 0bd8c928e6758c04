"""Logits equal to transformers' within 1e-4 in float32, on random tiny models of both families.

torch is needed, and its absence is a failure.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

from sdjax.io.checkpoint import read_model, write_model
from sdjax.models.spec import abstract
from sdjax.models.transformer import forward, unembed
from sdjax.models.tree import flatten

TOLERANCE = 1e-4
VOCAB = 61
LENGTH = 16

BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-5,
    "initializer_range": 0.3,  # wide, so that attention is far from uniform
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
VARIANTS = {
    "llama_mha": (LlamaConfig, {}),
    "llama_gqa": (LlamaConfig, {"num_key_value_heads": 2}),
    "llama_mqa_tied": (LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "llama_head_dim": (LlamaConfig, {"head_dim": 6, "num_key_value_heads": 2}),
    "llama_theta": (
        LlamaConfig,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}},
    ),
    "mistral_full": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": None}),
    "mistral_window": (MistralConfig, {"num_key_value_heads": 2, "sliding_window": 5}),
    "mistral_tied_head_dim": (
        MistralConfig,
        {"head_dim": 10, "num_key_value_heads": 2, "tie_word_embeddings": True},
    ),
}


@pytest.fixture(params=VARIANTS, scope="module")
def model(request, tmp_path_factory):
    """The model in torch, and ours as read from the folder that transformers saved."""
    kind, changes = VARIANTS[request.param]
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(
        kind(**{**BASE, **changes}), attn_implementation="eager", dtype=torch.float32
    ).eval()
    with torch.no_grad():
        for name, tensor in theirs.named_parameters():
            if "norm" in name:  # transformers starts them at one, which would hide an error
                tensor.uniform_(0.5, 1.5)
    folder = tmp_path_factory.mktemp(request.param)
    theirs.save_pretrained(folder)
    config, params = read_model(folder)
    return theirs, config, params, folder


def random_params(config, dtype=jnp.float32):
    """Parameters from NumPy: drawing them with JAX takes seconds of compilation."""
    rng = np.random.default_rng(3)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            0.2 * rng.standard_normal(leaf.shape) + (leaf.ndim == 1), leaf.dtype
        ),
        abstract(config, dtype),
    )


def tokens(batch: int, length: int = LENGTH, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCAB, (batch, length))


# Each of some forty programs runs once or twice: compiling them fast is what counts.
@functools.partial(
    jax.jit, static_argnames="config", compiler_options={"xla_backend_optimization_level": 0}
)
def run(params, ids, positions, segments, cache, *, config):
    hidden, cache = forward(
        params, None, ids, config=config, positions=positions, segments=segments, cache=cache
    )
    return unembed(params, hidden, config=config), cache


def plain_positions(batch: int, length: int) -> np.ndarray:
    return np.broadcast_to(np.arange(length), (batch, length))


def logits_of(theirs, ids, **arguments) -> np.ndarray:
    with torch.no_grad():
        return theirs(input_ids=torch.tensor(ids), **arguments).logits.numpy()


def our_logits(config, params, ids, positions=None, *, segments=None, cache=None):
    if positions is None:
        positions = plain_positions(*ids.shape)
    ids, positions = jnp.asarray(ids), jnp.asarray(positions)
    logits, cache = run(params, ids, positions, segments, cache, config=config)
    return np.asarray(logits), cache


def empty_cache(config, batch: int, size: int):
    shape = (batch, size, config.num_kv_heads, config.head_dim)
    zeros = np.zeros(shape, np.float32)
    return [{"k": zeros, "v": zeros} for _ in range(config.num_layers)]


def test_logits(model):
    theirs, config, params, _ = model
    ids = tokens(3)
    expected = logits_of(theirs, ids)
    assert np.ptp(expected) > 1  # a model that says something
    np.testing.assert_allclose(our_logits(config, params, ids)[0], expected, atol=TOLERANCE)


def test_padding_on_the_left_with_positions(model):
    """Padding takes another segment than the text, and positions count from the text's start."""
    theirs, config, params, _ = model
    ids = tokens(3)
    lengths = np.array([LENGTH, 11, 4])
    valid = np.arange(LENGTH) >= LENGTH - lengths[:, None]
    positions = np.where(valid, np.arange(LENGTH) - (LENGTH - lengths[:, None]), 0)
    expected = logits_of(
        theirs,
        ids,
        attention_mask=torch.tensor(valid.astype(int)),
        position_ids=torch.tensor(positions),
    )
    found, _ = our_logits(config, params, ids, positions, segments=valid.astype(np.int32))
    np.testing.assert_allclose(found[valid], expected[valid], atol=TOLERANCE)


def test_padding_on_the_right(model):
    theirs, config, params, _ = model
    ids = tokens(3)
    expected = logits_of(theirs, ids[1:, :9])
    found, _ = our_logits(config, params, ids)
    np.testing.assert_allclose(found[1:, :9], expected, atol=TOLERANCE)


def test_prefill_then_decoding_with_a_cache(model):
    """Rows of unequal prompt lengths, decoded one token at a time into one cache."""
    theirs, config, params, _ = model
    ids = tokens(3)
    expected = logits_of(theirs, ids)
    lengths = np.array([6, 9, 3])
    rows = np.arange(3)
    # What stands behind a prompt is read by nobody.
    prompts = np.where(np.arange(LENGTH) < lengths[:, None], ids, VOCAB - 1)
    prefill, entries = our_logits(config, params, prompts)
    for row, length in enumerate(lengths):
        np.testing.assert_allclose(prefill[row, :length], expected[row, :length], atol=TOLERANCE)
    cache = [
        {name: np.pad(entry[name], ((0, 0), (0, 4), (0, 0), (0, 0))) for name in entry}
        for entry in entries
    ]
    for step in range(LENGTH - lengths.max()):
        at = lengths + step
        found, cache = our_logits(config, params, ids[rows, at][:, None], at[:, None], cache=cache)
        np.testing.assert_allclose(found[:, 0], expected[rows, at], atol=TOLERANCE)


def test_prefill_in_two_pieces_into_a_cache(model):
    theirs, config, params, _ = model
    ids = tokens(2)
    expected = logits_of(theirs, ids)
    cache = empty_cache(config, 2, LENGTH)
    found = []
    for start, stop in ((0, 8), (8, LENGTH)):
        positions = plain_positions(2, LENGTH)[:, start:stop]
        piece, cache = our_logits(config, params, ids[:, start:stop], positions, cache=cache)
        found.append(piece)
    np.testing.assert_allclose(np.concatenate(found, 1), expected, atol=TOLERANCE)


def test_packed_segments_equal_separate_sequences(model):
    theirs, config, params, _ = model
    pieces = (tokens(3, 7, 1), tokens(3, 4, 2), tokens(3, 5, 3))
    sizes = [piece.shape[1] for piece in pieces]
    positions = np.concatenate([plain_positions(3, size) for size in sizes], 1)
    segments = np.broadcast_to(np.repeat(np.arange(3), sizes), (3, LENGTH)).astype(np.int32)
    packed, _ = our_logits(config, params, np.concatenate(pieces, 1), positions, segments=segments)
    expected = np.concatenate([logits_of(theirs, piece) for piece in pieces], 1)
    np.testing.assert_allclose(packed, expected, atol=TOLERANCE)


def test_what_we_write_transformers_reads(model, tmp_path):
    theirs, config, _, _ = model
    params = random_params(config)
    write_model(tmp_path / "ours", config, params)
    loaded, report = AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert type(loaded) is type(theirs)
    ids = tokens(3)
    found, _ = our_logits(config, params, ids)
    np.testing.assert_allclose(found, logits_of(loaded.eval(), ids), atol=TOLERANCE)


def test_the_round_trip_keeps_every_byte_in_bfloat16(model, tmp_path):
    theirs, _, _, _ = model
    theirs.to(torch.bfloat16).save_pretrained(tmp_path / "theirs")
    theirs.to(torch.float32)
    config, params = read_model(tmp_path / "theirs")
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    write_model(tmp_path / "ours", config, params)
    again = flatten(read_model(tmp_path / "ours")[1])
    state = AutoModelForCausalLM.from_pretrained(tmp_path / "ours").state_dict()
    stored = theirs.to(torch.bfloat16).state_dict()
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert torch.equal(state[name].view(torch.int16), tensor.view(torch.int16)), name
    theirs.to(torch.float32)
    for path, leaf in flatten(params).items():
        assert np.asarray(leaf).tobytes() == np.asarray(again[path]).tobytes()


@pytest.mark.parametrize("spelling", ["rope_theta", "rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("kind", [LlamaConfig, MistralConfig])
def test_rope_in_every_spelling_of_the_config(kind, spelling, tmp_path):
    torch.manual_seed(1)
    rope = {"rope_type": "default", "rope_theta": 300.0}
    theirs = AutoModelForCausalLM.from_config(
        kind(**{**BASE, "rope_parameters": rope}), attn_implementation="eager"
    ).eval()
    theirs.save_pretrained(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    fields.pop("rope_parameters", None)
    fields.pop("rope_theta", None)
    if spelling == "rope_parameters":
        fields["rope_parameters"] = rope
    else:
        fields["rope_theta"] = 300.0
        if spelling == "rope_scaling":
            fields["rope_scaling"] = None
    (tmp_path / "config.json").write_text(json.dumps(fields))
    config, params = read_model(tmp_path)
    assert config.rope.theta == 300.0
    ids = tokens(2)
    np.testing.assert_allclose(
        our_logits(config, params, ids)[0], logits_of(theirs, ids), atol=TOLERANCE
    )
