"""The decoder-only transformer as a pure function of its parameters.

Axes: B batch, T tokens, S key positions, D hidden, N heads, K key-value heads, G = N/K query
heads a key-value head, H head dimension, F mlp, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from sdjax.models.adapter import Adapter
from sdjax.models.config import ModelConfig

# Large and finite: a row without any allowed key (padding) stays finite.
_MASKED = -1e30

KVCache = list[dict[str, jax.Array]]


def forward(
    params: dict,
    adapter: Adapter | None,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    positions: jax.Array,
    segments: jax.Array | None = None,
    cache: KVCache | None = None,
) -> tuple[jax.Array, KVCache]:
    """Hidden states after the final norm, and the keys and values of every layer.

    Without a cache the tokens attend to one another: causally by `positions`, and only within
    the same number in `segments` where that is given (packed rows). With a cache the new keys
    and values are written at `positions` of each row first, and every entry up to a query's own
    position counts as valid; what lies beyond it is never read.

    Args:
        params: nested dict of the model's weights, the compute dtype being theirs.
        adapter: LoRA factors that are added to the projections, or None.
        tokens: [B, T] int32.
        positions: [B, T] int32, the place of each token in its sequence.
        segments: [B, T] int32 or None.
        cache: a list of `{"k": [B, S, K, H], "v": [B, S, K, H]}` a layer, or None.

    Returns:
        hidden [B, T, D], and the cache with the new tokens in it ([B, T, K, H] without one).
    """
    hidden = params["embed"][tokens]  # [B, T, D]
    rotation = rope(positions, config)
    if cache is None:
        key_positions = positions
    else:
        key_positions = jnp.arange(cache[0]["k"].shape[1], dtype=positions.dtype)[None]
    mask = attention_mask(positions, key_positions, segments, config.sliding_window)
    updated = []
    for index in range(config.num_layers):
        with jax.named_scope(f"layer_{index}"):
            layer = params["layers"][str(index)]
            lora = None if adapter is None else adapter.factors["layers"][str(index)]
            scale = 0.0 if adapter is None else adapter.scale
            normed = rms_norm(hidden, layer["input_norm"], config.norm_eps)
            mixed, entry = _attention(
                normed,
                layer["attn"],
                lora and lora.get("attn"),
                scale,
                rotation,
                mask,
                positions,
                None if cache is None else cache[index],
                config,
            )
            hidden = hidden + mixed
            normed = rms_norm(hidden, layer["post_attn_norm"], config.norm_eps)
            hidden = hidden + _mlp(normed, layer["mlp"], lora and lora.get("mlp"), scale)
            updated.append(entry)
    return rms_norm(hidden, params["final_norm"], config.norm_eps), updated


def unembed(params: dict, hidden: jax.Array) -> jax.Array:
    """Logits [..., V] in float32 of hidden states [..., D]."""
    weight = params["lm_head"] if "lm_head" in params else params["embed"]
    return jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """Root mean square normalisation in float32 (Zhang & Sennrich 2019)."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return scale * normed.astype(x.dtype)


def rope(positions: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, T, 1, H/2] in float32 (Su et al. 2021)."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    angles = positions[..., None].astype(jnp.float32) / config.rope_theta**exponents
    return jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]


def attention_mask(
    query_positions: jax.Array,
    key_positions: jax.Array,
    segments: jax.Array | None,
    window: int | None,
) -> jax.Array:
    """Which key each query may attend to: [B, T, S] bool."""
    distance = query_positions[:, :, None] - key_positions[:, None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if segments is not None:
        allowed &= segments[:, :, None] == segments[:, None, :]
    return allowed


def _attention(x, weights, lora, scale, rotation, mask, positions, entry, config):
    query = _project(x, weights, lora, "q_proj", scale)  # [B, T, N*H]
    key = _project(x, weights, lora, "k_proj", scale)  # [B, T, K*H]
    value = _project(x, weights, lora, "v_proj", scale)
    query = _rotate(rearrange(query, "b t (n h) -> b t n h", n=config.num_heads), rotation)
    key = _rotate(rearrange(key, "b t (k h) -> b t k h", k=config.num_kv_heads), rotation)
    value = rearrange(value, "b t (k h) -> b t k h", k=config.num_kv_heads)
    if entry is not None:
        rows = jnp.arange(positions.shape[0])[:, None]
        key = entry["k"].at[rows, positions].set(key.astype(entry["k"].dtype))
        value = entry["v"].at[rows, positions].set(value.astype(entry["v"].dtype))
    query = rearrange(query, "b t (k g) h -> b t k g h", k=config.num_kv_heads)
    scores = jnp.einsum("btkgh,bskh->bkgts", query, key, preferred_element_type=jnp.float32)
    scores = jnp.where(mask[:, None, None], scores * config.head_dim**-0.5, _MASKED)
    shares = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgts,bskh->btkgh", shares, value)
    mixed = rearrange(mixed, "b t k g h -> b t (k g h)")
    return _project(mixed, weights, lora, "o_proj", scale), {"k": key, "v": value}


def _mlp(x, weights, lora, scale):
    gate = jax.nn.silu(_project(x, weights, lora, "gate_proj", scale))  # [B, T, F]
    up = _project(x, weights, lora, "up_proj", scale)
    return _project(gate * up, weights, lora, "down_proj", scale)


def _project(x, weights, lora, name, scale):
    # As one matrix: XLA's CPU backend is slower where a gradient contracts over two axes.
    rows = rearrange(x, "b t i -> (b t) i")
    out = rows @ weights[name].T
    factors = lora and lora.get(name)
    if factors:
        low = rows @ factors["a"].astype(x.dtype).T
        out += scale * (low @ factors["b"].astype(x.dtype).T)
    return rearrange(out, "(b t) o -> b t o", b=x.shape[0])


def _rotate(x, rotation):
    """Rotates the two halves of each head, in float32, as Hugging Face lays them out."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)  # [B, T, N, H/2] each
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x.dtype)
