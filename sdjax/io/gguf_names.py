"""Inverse of llama.cpp's converter: names and changes of Hugging Face's tensors.

The converter is llama.cpp's convert_hf_to_gguf.py. It interleaves the rows of the query and key
projections of Llama and Mistral for its rotary embedding, and adds 1 to the scales of Gemma's
norms.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

_OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_MODULES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
# Modules with another name than above, of each architecture that is supported.
ARCHITECTURES: dict[str, dict[str, str]] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "phi3": {"ffn_up": "mlp.gate_up_proj"},
}
# They repeat what config.json says of the rotary embedding.
ROPE_TENSORS = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
_LAYER = re.compile(r"blk\.([0-9]{1,6})\.(\w+)\.(weight|bias)")


def hf_name(name: str, architecture: str) -> str | None:
    """Return the Hugging Face name of a tensor, or None if it is not known.

    Args:
        name: its name in the GGUF file.
        architecture: a key of `ARCHITECTURES`.

    Examples:
        >>> hf_name("blk.3.ffn_down.weight", "llama")
        'model.layers.3.mlp.down_proj.weight'
    """
    if name in _OUTSIDE:
        return _OUTSIDE[name]
    match = _LAYER.fullmatch(name)
    module = match and {**_MODULES, **ARCHITECTURES[architecture]}.get(match[2])
    return f"model.layers.{match[1]}.{module}.{match[3]}" if match and module else None


def stored_rows(
    name: str, architecture: str, settings: Mapping[str, Any], num_rows: int
) -> np.ndarray | None:
    """Return the stored row of each row of a tensor, or None if they are in order.

    Raises:
        ValueError: the number of heads does not divide the rows.
    """
    projection = re.search(r"\.self_attn\.([qk])_proj\.", name)
    if architecture != "llama" or projection is None:
        return None
    heads = settings.get("llama.attention.head_count")
    if projection[1] == "k":
        heads = settings.get("llama.attention.head_count_kv", heads)
    if not isinstance(heads, int) or heads < 1 or num_rows % (2 * heads):
        raise ValueError(f"{name} has {num_rows:,} rows for {heads!r} heads")
    # Both halves of a head follow one another here, and alternate in the file.
    stored = np.arange(num_rows).reshape(heads, -1, 2)
    return stored.transpose(0, 2, 1).reshape(-1)


def is_shifted(name: str, architecture: str) -> bool:
    """Return whether 1 has been added to a tensor."""
    return architecture in ("gemma2", "gemma3") and name.endswith("norm.weight")


def gguf_config(settings: Mapping[str, Any], *, vocab_size: int, tied: bool) -> dict[str, Any]:
    """Return the fields of a config.json for a GGUF file's settings.

    Args:
        settings: the settings.
        vocab_size: number of rows of the token embedding.
        tied: whether the file has no output matrix.

    Raises:
        ValueError: the settings do not describe the model completely.
    """
    architecture = settings.get("general.architecture")
    families = {"llama": "Llama", "qwen2": "Qwen2", "qwen3": "Qwen3"}
    if architecture not in families:
        raise ValueError(f"those of {architecture!r} are not complete")

    def setting(key: str) -> Any:
        value = settings.get(f"{architecture}.{key}")
        # Stored in float32: 1e-6 and not 9.99999997e-7.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if setting("rope.scaling.type") not in (None, "none"):
        raise ValueError("the rotary embedding is scaled")
    heads, hidden = setting("attention.head_count"), setting("embedding_length")
    fields = {
        "architectures": [f"{families[architecture]}ForCausalLM"],
        "model_type": architecture,
        "hidden_size": hidden,
        "intermediate_size": setting("feed_forward_length"),
        "num_hidden_layers": setting("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": setting("attention.head_count_kv") or heads,
        "head_dim": setting("attention.key_length") or setting("rope.dimension_count"),
        "max_position_embeddings": setting("context_length"),
        "rms_norm_eps": setting("attention.layer_norm_rms_epsilon"),
        "rope_theta": setting("rope.freq_base") or 10_000.0,
        "vocab_size": vocab_size,
        "hidden_act": "silu",
        "tie_word_embeddings": tied,
        "bos_token_id": settings.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": settings.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": settings.get("tokenizer.ggml.padding_token_id"),
    }
    return {key: value for key, value in fields.items() if value is not None}
