"""Frequencies as transformers computes them, for the settings of public checkpoints."""

import copy

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, Phi3Config, PreTrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from sdjax.models.hf_config import from_hf

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


def settings(context: int, theta: float, **scaling) -> dict:
    return {
        **SIZES,
        "max_position_embeddings": context,
        "rope_theta": theta,
        "rope_scaling": scaling or None,
    }


LLAMA_31 = settings(
    131072,
    500_000.0,
    rope_type="llama3",
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)
QWEN_25 = settings(131072, 1e6, type="yarn", factor=4.0, original_max_position_embeddings=32768)
PHI_3_128K = {
    **settings(131072, 10_000.0, **LONG),
    "hidden_size": 96,
    "original_max_position_embeddings": 4096,
}
CASES = {
    "llama3": (LlamaConfig, LLAMA_31, 0),
    "linear": (LlamaConfig, settings(8192, 10_000.0, rope_type="linear", factor=4.0), 0),
    "yarn": (LlamaConfig, QWEN_25, 0),
    "yarn with everything": (
        LlamaConfig,
        settings(
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
    "longrope by its older name": (
        Phi3Config,
        {
            **PHI_3_128K,
            "rope_scaling": {**LONG, "type": "su", "original_max_position_embeddings": 4096},
        },
        4097,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_frequencies(name):
    kind, fields, reach = CASES[name]
    theirs: PreTrainedConfig = kind(**copy.deepcopy(fields))  # which changes them
    rope_type = theirs.rope_parameters["rope_type"]
    frequencies, attention = ROPE_INIT_FUNCTIONS[rope_type](theirs, seq_len=reach)
    config = from_hf({**fields, "model_type": kind.model_type}, "config.json")
    found = config.rope.frequencies(config.head_dim, reach)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, frequencies.to(torch.float64).numpy(), rtol=1e-6)
    assert config.rope.scaling.attention_factor == pytest.approx(attention, rel=1e-12)
