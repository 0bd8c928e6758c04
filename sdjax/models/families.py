"""Differences between transformer families, as data that the forward pass reads.

Sources: Llama (arXiv 2302.13971, 2407.21783), Mistral (2310.06825), Qwen2 (2407.10671), Qwen3
(2505.09388), Gemma 2 (2408.00118), Gemma 3 (2503.19786), Phi-3 (2404.14219).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Literal

import jax


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """Architecture of a family, the same for all of its sizes.

    Attributes:
        architecture: class name in transformers.
        activation: activation function of the MLP's gate.
        fused: whether query, key and value are one projection, and gate and up another.
        qkv_bias: whether the query, key and value projections have biases.
        qk_norm: whether the queries and keys of each head are normalized before rotation.
        sandwich_norms: whether attention and MLP are followed by a norm as well as preceded by one.
        zero_centered_norm: whether a norm multiplies by one plus its scale, in float32.
        scaled_embedding: whether embeddings are multiplied by the square root of their width.
        windows: layers with a sliding window: none, all, those from `max_window_layers` up, or all
            except every n-th.
        local_rope: whether sliding-window layers have their own rotary base.
        fixed: fields of config.json with their only supported value.
        defaults: fields that config.json may omit, with the values that transformers fills in.
        rope_aliases: older names of rotary scaling types.
    """

    architecture: str
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    fused: bool = False
    qkv_bias: bool = False
    qk_norm: bool = False
    sandwich_norms: bool = False
    zero_centered_norm: bool = False
    scaled_embedding: bool = False
    windows: Literal["none", "all", "upper", "cyclic"] = "none"
    local_rope: bool = False
    fixed: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    rope_aliases: Mapping[str, str] = dataclasses.field(default_factory=dict)


_SILU = {"hidden_act": "silu"}
_QWEN_WINDOWS = {"use_sliding_window": False, "sliding_window": 4096, "max_window_layers": 28}
_WIDE_HEADS = {"head_dim": 256, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}

_gemma = partial(
    Family,
    activation=partial(jax.nn.gelu, approximate=True),
    sandwich_norms=True,
    zero_centered_norm=True,
    scaled_embedding=True,
    windows="cyclic",
)
_GEMMA_FIXED = {
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "use_bidirectional_attention": False,
}

FAMILIES: dict[str, Family] = {
    "llama": Family(
        architecture="LlamaForCausalLM",
        fixed={**_SILU, "attention_bias": False, "mlp_bias": False},
    ),
    "mistral": Family(
        architecture="MistralForCausalLM",
        windows="all",
        fixed=_SILU,
        defaults={"sliding_window": 4096, "num_key_value_heads": 8},
    ),
    "qwen2": Family(
        architecture="Qwen2ForCausalLM",
        qkv_bias=True,
        windows="upper",
        fixed=_SILU,
        defaults=_QWEN_WINDOWS,
    ),
    "qwen3": Family(
        architecture="Qwen3ForCausalLM",
        qk_norm=True,
        windows="upper",
        fixed={**_SILU, "attention_bias": False},
        defaults={**_QWEN_WINDOWS, "head_dim": 128},
    ),
    "gemma2": _gemma(
        architecture="Gemma2ForCausalLM",
        fixed=_GEMMA_FIXED,
        defaults={
            **_WIDE_HEADS,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 2,
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
        },
    ),
    "gemma3_text": _gemma(
        architecture="Gemma3ForCausalLM",
        qk_norm=True,
        local_rope=True,
        fixed={**_GEMMA_FIXED, "attn_logit_softcapping": None},
        defaults={
            **_WIDE_HEADS,
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "sliding_window_pattern": 6,
            "rope_theta": 1_000_000.0,
        },
    ),
    "phi3": Family(
        architecture="Phi3ForCausalLM",
        fused=True,
        windows="all",
        fixed=_SILU,
        defaults={"rms_norm_eps": 1e-5, "original_max_position_embeddings": 4096},
        rope_aliases={"su": "longrope", "yarn": "longrope"},
    ),
}
