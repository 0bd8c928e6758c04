"""Parity of rotary frequencies with transformers, for the settings of public checkpoints."""

import copy

import numpy as np
import pytest
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sdjax.models.hf_config import from_hf

torch = pytest.importorskip("torch", reason="needs torch, the reference of the parity tests")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
}
LONG = {
    "type": "longrope",
    "short_factor": [1.0 + 0.05 * n for n in range(48)],
    "long_factor": [1.0 + 1.3 * n for n in range(48)],
}


def rope_fields(max_seq_len: int, theta: float, **scaling) -> dict:
    return {
        **SIZES,
        "max_position_embeddings": max_seq_len,
        "rope_theta": theta,
        "rope_scaling": scaling or None,
    }


LLAMA_31 = rope_fields(
    131072,
    500_000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
QWEN_25 = rope_fields(131072, 1e6, type="yarn", factor=4.0, original_max_position_embeddings=32768)
PHI_3_128K = {
    **rope_fields(131072, 10_000.0, **LONG),
    "hidden_size": 96,
    "original_max_position_embeddings": 4096,
}
CASES = {
    "llama3": (LlamaConfig, LLAMA_31, 0),
    "linear": (LlamaConfig, rope_fields(8192, 10_000.0, rope_type="linear", factor=4.0), 0),
    "yarn": (LlamaConfig, QWEN_25, 0),
    "yarn with all fields": (
        LlamaConfig,
        rope_fields(
            4096,
            10_000.0,
            rope_type="yarn",
            factor=16.0,
            original_max_position_embeddings=256,
            beta_fast=24,
            beta_slow=2,
            mscale=0.7,
            mscale_all_dim=1.1,
            truncate=False,
        ),
        0,
    ),
    "longrope, short": (Phi3Config, PHI_3_128K, 4096),
    "longrope, long": (Phi3Config, PHI_3_128K, 4097),
    "longrope under its older name": (
        Phi3Config,
        {
            **PHI_3_128K,
            "rope_scaling": {**LONG, "type": "su", "original_max_position_embeddings": 4096},
        },
        4097,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies_equal_transformers(name):
    config_class, fields, max_length = CASES[name]
    expected_config: PreTrainedConfig = config_class(**copy.deepcopy(fields))  # mutates them
    rope_type = expected_config.rope_parameters["rope_type"]
    expected, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](expected_config, seq_len=max_length)
    config = from_hf({**fields, "model_type": config_class.model_type}, "config.json")
    frequencies = config.rope.frequencies(config.head_dim, max_length)
    assert frequencies.dtype == np.float32
    np.testing.assert_allclose(frequencies, expected.to(torch.float64).numpy(), rtol=1e-6)
    assert config.rope.scaling.attention_factor == pytest.approx(attention_factor, rel=1e-12)
