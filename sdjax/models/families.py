"""What sets the families of transformers apart, as data; the mathematics reads it.

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
    """The traits of a family, the same for each of its sizes.

    Attributes:
        architecture: the class in transformers.
        activation: of the gate in the MLP.
        fused: queries, keys and values are one projection, and so are gate and up.
        qkv_bias: the projections of queries, keys and values have biases.
        qk_norm: each head's queries and keys are normalised before they are rotated.
        sandwich_norms: attention and MLP are normalised behind as well as before.
        centred_norms: a normalisation multiplies by one plus its scale, in float32.
        scaled_embedding: embeddings are multiplied by the root of their width.
        windows: which layers have a sliding window: all, those from `max_window_layers` on, or all
            but every n-th.
        local_rope: layers with a window have a rotary base of their own.
        fixed: fields of config.json in which only this value is supported.
        defaults: fields that config.json may omit, as transformers fills them in.
        rope_aliases: older names of the rotary scalings.
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
