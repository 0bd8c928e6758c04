"""Decoder-only transformer as a pure function of its parameters.

Axes: see `sdjax.models.types`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from einops import rearrange
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.rope import CosSin, apply_rotary, rotary_cos_sin
from sdjax.models.types import AnyArray, KVCache, Params
from sdjax.xla.matmul import matmul_transposed

# Large and finite, so that rows without any allowed key (padding) stay finite.
_MASKED = -1e30

Observe = Callable[[str, str, jax.Array], None]
"""Called with (module, name, input) of a projection: "layers/3/attn", "q_proj", [batch time in]."""

# Checkpoint name of the hidden states between layers, for policies of `jax.checkpoint`.
RESIDUAL = "residual"


def forward(
    params: Params,
    adapter: Adapter | None,
    tokens: Int[AnyArray, "batch time"],
    *,
    config: ModelConfig,
    positions: Int[AnyArray, "batch time"],
    segments: Int[AnyArray, "batch time"] | None = None,
    cache: KVCache | None = None,
    max_length: int | None = None,
    observe: Observe | None = None,
) -> tuple[Float[Array, "batch time hidden"], KVCache]:
    """Return the hidden states after the final norm, and the KV cache.

    Without a cache, tokens attend to each other causally by `positions`, and only within the same
    segment if `segments` is given (packed rows). With a cache, the new keys and values are first
    written at `positions`; a query then attends to every entry up to its own position, and entries
    beyond it are never read.

    Args:
        params: parameters of the model; their dtype is the compute dtype.
        adapter: LoRA adapter applied to the projections, or None.
        tokens: token ids.
        config: config of the model.
        positions: position of each token in its sequence.
        segments: sequence number of each token in packed rows, or None.
        cache: keys and values of earlier tokens, or None.
        max_length: maximum length that these sequences will ever have, by which LongRoPE selects
            its frequencies; the size of the cache, or `time`, by default. All calls that share a
            cache must use the same value.
        observe: called during tracing with the input of every projection in the layers.

    Returns:
        The hidden states and the cache including the new tokens. Without an input cache, the
        returned cache holds the new tokens only.
    """
    arch = config.arch
    hidden = params["embed"][tokens]  # [batch time hidden]
    if arch.scaled_embedding:
        hidden = hidden * jnp.asarray(config.hidden_size**0.5, hidden.dtype)
    key_positions = positions
    if cache is not None:
        key_positions = jnp.arange(cache[0]["v"].shape[2], dtype=positions.dtype)[None]
    max_length = max_length or key_positions.shape[1]
    cos_sin = {
        rope: rotary_cos_sin(positions, rope, head_dim=config.head_dim, max_length=max_length)
        for rope in set(config.ropes)
    }
    # Biases are added instead of selected with `where`, whose gradient stores zeros per layer.
    biases = {
        window: jnp.where(attention_mask(positions, key_positions, segments, window), 0.0, _MASKED)
        for window in set(config.windows)
    }

    def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
        return rms_norm(x, scale, config.norm_eps, zero_centered=arch.zero_centered_norm)

    new_cache = []
    for index, (rope, window) in enumerate(zip(config.ropes, config.windows, strict=True)):
        with jax.named_scope(f"layer_{index}"):
            layer = params["layers"][str(index)]
            lora = None if adapter is None else adapter.factors["layers"].get(str(index), {})
            lora_scale = 0.0 if adapter is None else adapter.scale
            attn_out, layer_cache = _attention(
                norm(hidden, layer["input_norm"]),
                layer["attn"],
                lora and lora.get("attn"),
                lora_scale,
                cos_sin[rope],
                biases[window],
                positions,
                None if cache is None else cache[index],
                config,
                observe and partial(observe, f"layers/{index}/attn"),
            )
            mlp_norm = layer["post_attn_norm"]
            if arch.sandwich_norms:
                attn_out, mlp_norm = norm(attn_out, layer["post_attn_norm"]), layer["pre_mlp_norm"]
            hidden = hidden + attn_out
            mlp_out = _mlp(
                norm(hidden, mlp_norm),
                layer["mlp"],
                lora and lora.get("mlp"),
                lora_scale,
                config,
                observe and partial(observe, f"layers/{index}/mlp"),
            )
            if arch.sandwich_norms:
                mlp_out = norm(mlp_out, layer["post_mlp_norm"])
            hidden = checkpoint_name(hidden + mlp_out, RESIDUAL)
            new_cache.append(layer_cache)
    return norm(hidden, params["final_norm"]), new_cache


def unembed(
    params: Params, hidden: Float[Array, "*batch hidden"], *, config: ModelConfig
) -> Float[Array, "*batch vocab"]:
    """Return the float32 logits of hidden states."""
    weight = params["lm_head"] if "lm_head" in params else params["embed"]
    logits = matmul_transposed(hidden.reshape(-1, hidden.shape[-1]), weight, dtype=jnp.float32)
    return _soft_cap(logits.reshape(*hidden.shape[:-1], -1), config.final_logit_softcap)


def rms_norm(
    x: Float[Array, "*batch width"],
    scale: Float[Array, " width"],
    eps: float,
    *,
    zero_centered: bool = False,
) -> Float[Array, "*batch width"]:
    """Apply root mean square normalization in float32 (Zhang & Sennrich 2019, arXiv 1910.07467).

    Args:
        x: values to normalize along the last axis.
        scale: factor of each dimension.
        eps: added to the mean square.
        zero_centered: multiply by 1 + scale instead, before the dtype of `x` is restored.
    """
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    if zero_centered:
        return (normed * (1 + scale.astype(jnp.float32))).astype(x.dtype)
    return scale * normed.astype(x.dtype)


def attention_mask(
    query_positions: Int[AnyArray, "batch time"],
    key_positions: Int[AnyArray, "#batch keys"],
    segments: Int[AnyArray, "batch time"] | None,
    window: int | None,
) -> Bool[Array, "batch time keys"]:
    """Return the mask of the keys that each query may attend to."""
    distance = jnp.asarray(query_positions)[:, :, None] - key_positions[:, None, :]
    allowed = distance >= 0
    if window is not None:
        allowed &= distance < window
    if segments is not None:
        allowed &= segments[:, :, None] == segments[:, None, :]
    return allowed


def _attention(
    x: Float[Array, "batch time hidden"],
    weights: Params,
    lora: Params | None,
    lora_scale: float,
    cos_sin: CosSin,
    bias: Float[Array, "batch time keys"],
    positions: Int[AnyArray, "batch time"],
    cache: dict[str, jax.Array] | None,
    config: ModelConfig,
    observe: Callable[[str, jax.Array], None] | None,
) -> tuple[Float[Array, "batch time hidden"], dict[str, jax.Array]]:
    """Return the output of grouped-query attention, and the layer's keys and values."""
    heads, kv_heads = config.num_heads, config.num_kv_heads
    if config.arch.fused:
        fused = _project(x, weights, lora, "qkv_proj", lora_scale, observe)
        ends = [heads * config.head_dim, (heads + kv_heads) * config.head_dim]
        query, key, value = jnp.split(fused, ends, axis=-1)
    else:
        query = _project(x, weights, lora, "q_proj", lora_scale, observe)
        key = _project(x, weights, lora, "k_proj", lora_scale, observe)
        value = _project(x, weights, lora, "v_proj", lora_scale, observe)
    query = rearrange(query, "b t (n h) -> b n t h", n=heads)
    key = rearrange(key, "b t (k h) -> b k t h", k=kv_heads)
    value = rearrange(value, "b t (k h) -> b k t h", k=kv_heads)
    if config.arch.qk_norm:
        zero_centered = config.arch.zero_centered_norm
        query = rms_norm(query, weights["q_norm"], config.norm_eps, zero_centered=zero_centered)
        key = rms_norm(key, weights["k_norm"], config.norm_eps, zero_centered=zero_centered)
    query, key = apply_rotary(query, cos_sin), apply_rotary(key, cos_sin)
    # Both matmuls contract over the second-to-last axis of the cache: XLA's CPU backend would
    # copy a key cache [batch kv_heads keys head_dim] into this order at every step.
    key = rearrange(key, "b k s h -> b k h s")
    if cache is not None:
        key, value = _update_cache(cache, key, value, positions)
    query = rearrange(query, "b (k g) t h -> b k g t h", k=kv_heads)
    scores = jnp.einsum("bkgth,bkhs->bkgts", query, key, preferred_element_type=jnp.float32)
    scores = _soft_cap(
        scores * (config.query_pre_attn_scalar or config.head_dim) ** -0.5,
        config.attn_logit_softcap,
    )
    probs = jax.nn.softmax(scores + bias[:, None, None], axis=-1).astype(value.dtype)
    attn_out = jnp.einsum("bkgts,bksh->bkgth", probs, value)
    attn_out = rearrange(attn_out, "b k g t h -> b t (k g h)")
    attn_out = _project(attn_out, weights, lora, "o_proj", lora_scale, observe)
    return attn_out, {"k": key, "v": value}


def _update_cache(
    cache: dict[str, jax.Array],
    key: Float[Array, "batch kv_heads head_dim time"],
    value: Float[Array, "batch kv_heads time head_dim"],
    positions: Int[AnyArray, "batch time"],
) -> tuple[
    Float[Array, "batch kv_heads head_dim keys"], Float[Array, "batch kv_heads keys head_dim"]
]:
    """Return the cached keys and values with the new ones written at `positions`."""
    rows = jnp.arange(positions.shape[0])[:, None]
    key = rearrange(key, "b k h t -> b t k h").astype(cache["k"].dtype)
    value = rearrange(value, "b k t h -> b t k h").astype(cache["v"].dtype)
    return (
        cache["k"].at[rows, :, :, positions].set(key),
        cache["v"].at[rows, :, positions].set(value),
    )


def _mlp(
    x: Float[Array, "batch time hidden"],
    weights: Params,
    lora: Params | None,
    lora_scale: float,
    config: ModelConfig,
    observe: Callable[[str, jax.Array], None] | None,
) -> Float[Array, "batch time hidden"]:
    if config.arch.fused:
        fused = _project(x, weights, lora, "gate_up_proj", lora_scale, observe)
        gate, up = jnp.split(fused, 2, axis=-1)
    else:
        gate = _project(x, weights, lora, "gate_proj", lora_scale, observe)
        up = _project(x, weights, lora, "up_proj", lora_scale, observe)
    product = config.arch.activation(gate) * up
    return _project(product, weights, lora, "down_proj", lora_scale, observe)


def _project(
    x: Float[Array, "batch time in"],
    weights: Params,
    lora: Params | None,
    name: str,
    lora_scale: float,
    observe: Callable[[str, jax.Array], None] | None,
) -> Float[Array, "batch time out"]:
    """Apply a projection with its bias and LoRA factors, if it has them."""
    if observe is not None:
        observe(name, x)
    # One matrix: XLA's CPU backend is slower when a gradient contracts over two axes.
    rows = rearrange(x, "b t i -> (b t) i")
    out = matmul_transposed(rows, weights[name])
    if f"{name}_bias" in weights:
        out += weights[f"{name}_bias"]
    factors = lora and lora.get(name)
    if factors:
        low_rank = rows @ factors["a"].astype(x.dtype).T
        out += lora_scale * (low_rank @ factors["b"].astype(x.dtype).T)
    return rearrange(out, "(b t) o -> b t o", b=x.shape[0])


def _soft_cap(x: jax.Array, cap: float | None) -> jax.Array:
    """Limit values smoothly to (-cap, cap) (Gemma 2, arXiv 2408.00118, section 2)."""
    return x if cap is None else cap * jnp.tanh(x / cap)
