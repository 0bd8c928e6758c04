"""The decoder-only transformer as a pure function of its parameters.

Axes: B batch, T tokens, S key positions, D hidden, N heads, K key-value heads, G = N/K query
heads a key-value head, H head dimension, F mlp, V vocabulary.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name

from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.rope import rotate, rotation

# Large and finite: a row without any allowed key (padding) stays finite.
_MASKED = -1e30

_FEW_ROWS = 128

# The name of the hidden states between layers, for policies of `jax.checkpoint`.
RESIDUAL = "residual"

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
    reach: int | None = None,
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
        cache: a list of `{"k": [B, K, H, S], "v": [B, K, S, H]}` a layer, or None.
        reach: the most tokens that these sequences will ever have, by which LongRoPE chooses its
            frequencies; what the cache holds, or T, by default. Keys of one cache need one reach.

    Returns:
        hidden [B, T, D], and the cache with the new tokens in it (of these alone without one).
    """
    family = config.arch
    hidden = params["embed"][tokens]  # [B, T, D]
    if family.scaled_embedding:
        hidden = hidden * jnp.asarray(config.hidden_size**0.5, hidden.dtype)
    key_positions = positions
    if cache is not None:
        key_positions = jnp.arange(cache[0]["v"].shape[2], dtype=positions.dtype)[None]
    reach = reach or key_positions.shape[1]
    rotations = {
        rope: rotation(positions, rope, head_dim=config.head_dim, reach=reach)
        for rope in set(config.ropes)
    }
    # Added rather than selected by: the gradient of a choice stores an array of zeros a layer.
    biases = {
        window: jnp.where(attention_mask(positions, key_positions, segments, window), 0.0, _MASKED)
        for window in set(config.windows)
    }

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return rms_norm(x, scale, config.norm_eps, centred=family.zero_centered_norm)

    updated = []
    for index, (rope, window) in enumerate(zip(config.ropes, config.windows, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            layer = params["layers"][str(index)]
            lora = None if adapter is None else adapter.factors["layers"].get(str(index), {})
            scale = 0.0 if adapter is None else adapter.scale
            mixed, entry = _attention(
                norm(hidden, layer["input_norm"]),
                layer["attn"],
                lora and lora.get("attn"),
                scale,
                rotations[rope],
                biases[window],
                positions,
                None if cache is None else cache[index],
                config,
            )
            before_mlp = layer["post_attn_norm"]
            if family.sandwich_norms:
                mixed, before_mlp = norm(mixed, layer["post_attn_norm"]), layer["pre_mlp_norm"]
            hidden = hidden + mixed
            mixed = _mlp(
                norm(hidden, before_mlp), layer["mlp"], lora and lora.get("mlp"), scale, config
            )
            if family.sandwich_norms:
                mixed = norm(mixed, layer["post_mlp_norm"])
            hidden = checkpoint_name(hidden + mixed, RESIDUAL)
            updated.append(entry)
    return norm(hidden, params["final_norm"]), updated


def unembed(params: dict, hidden: jax.Array, *, config: ModelConfig) -> jax.Array:
    """Logits [..., V] in float32 of hidden states [..., D]."""
    weight = params["lm_head"] if "lm_head" in params else params["embed"]
    logits = _times(hidden.reshape(-1, hidden.shape[-1]), weight, out=jnp.float32)
    return _capped(logits.reshape(*hidden.shape[:-1], -1), config.final_logit_softcap)


def rms_norm(x: jax.Array, scale: jax.Array, eps: float, *, centred: bool = False) -> jax.Array:
    """Root mean square normalisation in float32 (Zhang & Sennrich 2019).

    centred: multiply by 1 + scale, before x's dtype is restored.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if centred:
        return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return scale * normed.astype(x.dtype)


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


def _attention(x, weights, lora, scale, turn, bias, positions, entry, config):
    family = config.arch
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if family.fused:
        fused = _project(x, weights, lora, "qkv_proj", scale)  # [B, T, (N+2K)*H]
        ends = [heads * config.head_dim, (heads + kv_heads) * config.head_dim]
        query, key, value = jnp.split(fused, ends, axis=-1)
    else:
        query = _project(x, weights, lora, "q_proj", scale)  # [B, T, N*H]
        key = _project(x, weights, lora, "k_proj", scale)  # [B, T, K*H]
        value = _project(x, weights, lora, "v_proj", scale)
    query = rearrange(query, "b t (n h) -> b n t h", n=heads)
    key = rearrange(key, "b t (k h) -> b k t h", k=kv_heads)
    value = rearrange(value, "b t (k h) -> b k t h", k=kv_heads)
    if family.qk_norm:
        query, key = (
            rms_norm(x, weights[name], config.norm_eps, centred=family.zero_centered_norm)
            for x, name in ((query, "q_norm"), (key, "k_norm"))
        )
    query, key = rotate(query, turn), rotate(key, turn)
    # Both products contract over the cache's last axis but one: XLA's CPU backend copies a cache
    # of keys [B, K, S, H] into this order for each step.
    key = rearrange(key, "b k s h -> b k h s")
    if entry is not None:
        key, value = _written(entry, key, value, positions)
    query = rearrange(query, "b (k g) t h -> b k g t h", k=kv_heads)
    scores = jnp.einsum("bkgth,bkhs->bkgts", query, key, preferred_element_type=jnp.float32)
    scores = _capped(
        scores * (config.query_pre_attn_scalar or config.head_dim) ** -0.5,
        config.attn_logit_softcap,
    )
    shares = jax.nn.softmax(scores + bias[:, None, None], axis=-1).astype(value.dtype)
    mixed = jnp.einsum("bkgts,bksh->bkgth", shares, value)
    mixed = rearrange(mixed, "b k g t h -> b t (k g h)")
    return _project(mixed, weights, lora, "o_proj", scale), {"k": key, "v": value}


def _written(entry, key, value, positions):
    """The cache's keys and values with new ones at positions [B, T]."""
    rows = jnp.arange(positions.shape[0])[:, None]
    key = rearrange(key, "b k h t -> b t k h").astype(entry["k"].dtype)
    value = rearrange(value, "b k t h -> b t k h").astype(entry["v"].dtype)
    return (
        entry["k"].at[rows, :, :, positions].set(key),
        entry["v"].at[rows, :, positions].set(value),
    )


def _mlp(x, weights, lora, scale, config):
    if config.arch.fused:
        fused = _project(x, weights, lora, "gate_up_proj", scale)  # [B, T, 2F]
        gate, up = jnp.split(fused, 2, axis=-1)
    else:
        gate = _project(x, weights, lora, "gate_proj", scale)  # [B, T, F]
        up = _project(x, weights, lora, "up_proj", scale)
    return _project(config.arch.activation(gate) * up, weights, lora, "down_proj", scale)


def _project(x, weights, lora, name, scale):
    # As one matrix: XLA's CPU backend is slower where a gradient contracts over two axes.
    rows = rearrange(x, "b t i -> (b t) i")
    out = _times(rows, weights[name])
    if f"{name}_bias" in weights:
        out += weights[f"{name}_bias"]
    factors = lora and lora.get(name)
    if factors:
        low = rows @ factors["a"].astype(x.dtype).T
        out += scale * (low @ factors["b"].astype(x.dtype).T)
    return rearrange(out, "(b t) o -> b t o", b=x.shape[0])


def _times(rows, weight, out=None):
    """Rows [R, I] by a weight [O, I]: [R, O], in the dtype `out` if it is given.

    With few rows, as when decoding, XLA's CPU backend multiplies up to three times as fast if the
    weight stands left. The barrier keeps XLA from turning the product round again.
    """
    if rows.shape[0] > _FEW_ROWS:
        return jnp.matmul(rows, weight.T, preferred_element_type=out)
    turned = jnp.matmul(weight, rows.T, preferred_element_type=out)
    return jax.lax.optimization_barrier(turned).T


def _capped(x, cap):
    """Values softly limited to (-cap, cap) (Gemma 2, arXiv 2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
