"""GGUF files, written by hand."""

import struct
from collections.abc import Mapping
from typing import Any

import numpy as np

F32, F16, Q8_0, BF16 = 0, 1, 8, 30


def gguf_file(
    settings: Mapping[str, Any],
    tensors: Mapping[str, tuple[int, tuple[int, ...], bytes]],
    *,
    version: int = 3,
) -> bytes:
    """Return a GGUF file.

    Args:
        settings: key to an int, float, bool, text or list of them.
        tensors: name to (element type, shape with the last axis contiguous, bytes).
        version: version of the format.
    """
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(settings))
    for key, value in settings.items():
        kind, content = _value(value)
        header += _text(key) + struct.pack("<I", kind) + content
    data = b""
    for name, (kind, shape, content) in tensors.items():
        header += _text(name) + struct.pack("<I", len(shape))
        header += struct.pack(f"<{len(shape)}Q", *shape[::-1]) + struct.pack("<IQ", kind, len(data))
        data += content + b"\0" * (-len(content) % 32)
    return header + b"\0" * (-len(header) % 32) + data


def _text(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def _value(value: Any) -> tuple[int, bytes]:
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return 8, _text(value)
        case [first, *_]:
            items = b"".join(_value(item)[1] for item in value)
            return 9, struct.pack("<IQ", _value(first)[0], len(value)) + items
    raise TypeError(value)


def q8_0(array: np.ndarray) -> bytes:
    """Quantize rows of multiples of 32 elements to signed bytes with a scale in float16."""
    blocks = array.astype(np.float32).reshape(-1, 32)
    scales = (np.abs(blocks).max(axis=1, keepdims=True) / 127).astype(np.float16)
    steps = np.where(scales == 0, 1, scales).astype(np.float32)
    numbers = np.clip(np.round(blocks / steps), -127, 127).astype(np.int8)
    return b"".join(s.tobytes() + n.tobytes() for s, n in zip(scales, numbers, strict=True))


_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.qkv_proj": "attn_qkv",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_GEMMA = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
ARCHITECTURES = {"mistral": "llama", "gemma3_text": "gemma3"}


def in_gguf(config: Mapping[str, Any], tensors: Mapping[str, np.ndarray], kind: int = F32) -> bytes:
    """Return the GGUF file of a Hugging Face model, as llama.cpp's converter changes it.

    Args:
        config: content of the model's config.json.
        tensors: its tensors.
        kind: element type of the matrices.
    """
    model_type = config["model_type"]
    architecture = ARCHITECTURES.get(model_type, model_type)
    names = _NAMES | (_GEMMA if architecture.startswith("gemma") else {})
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    stored = {}
    for name, array in tensors.items():
        array = np.asarray(array, np.float32)
        if architecture == "llama" and ("q_proj" in name or "k_proj" in name):
            count = heads if "q_proj" in name else kv_heads
            halves = array.reshape(count, 2, -1, *array.shape[1:])  # convert_hf_to_gguf.py: permute
            array = halves.swapaxes(1, 2).reshape(array.shape)
        if architecture.startswith("gemma") and name.endswith("norm.weight"):
            array = array + 1
        match name.split("."):
            case ["model", "layers", layer, *module, end]:
                own = f"blk.{layer}.{names['.'.join(module)]}.{end}"
            case _:
                own = {
                    "model.embed_tokens.weight": "token_embd.weight",
                    "model.norm.weight": "output_norm.weight",
                    "lm_head.weight": "output.weight",
                }[name]
        is_matrix = array.ndim > 1
        content = {F32: array.tobytes, F16: array.astype(np.float16).tobytes}
        content[Q8_0] = lambda array=array: q8_0(array)
        own_kind = kind if is_matrix else F32
        stored[own] = own_kind, array.shape, content[own_kind]()
    settings = {
        "general.architecture": architecture,
        f"{architecture}.context_length": config["max_position_embeddings"],
        f"{architecture}.embedding_length": config["hidden_size"],
        f"{architecture}.block_count": config["num_hidden_layers"],
        f"{architecture}.feed_forward_length": config["intermediate_size"],
        f"{architecture}.attention.head_count": heads,
        f"{architecture}.attention.head_count_kv": kv_heads,
        f"{architecture}.attention.key_length": config["head_dim"],
        f"{architecture}.attention.layer_norm_rms_epsilon": float(config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": float(config.get("rope_theta") or 10_000.0),
        "tokenizer.ggml.tokens": [f"<{i}>" for i in range(config["vocab_size"])],
        "tokenizer.ggml.scores": [0.0] * 2_000,
        "tokenizer.ggml.eos_token_id": config["eos_token_id"] or 0,
    }
    return gguf_file(settings, stored)
