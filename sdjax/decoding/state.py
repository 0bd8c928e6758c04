"""State of a decoder's slots between compiled calls.

Axes: stop (token ids that end a sequence); the others are in `sdjax.models.types`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sdjax.models.config import ModelConfig
from sdjax.sharding.rules import batch_sharding, sharding_of

# Platforms on which the key cache is laid out in memory like the value cache.
TRANSPOSED_KEY_PLATFORMS = ("tpu",)

# An array, or its shape or sharding.
Leaf: TypeAlias = Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class DecodeState:
    """State of all slots.

    Trees of the same type hold the shapes or the shardings of these arrays.

    Attributes:
        cache: for each layer, keys [slots kv_heads head_dim keys] and values
            [slots kv_heads keys head_dim].
        tokens: [slots max_new_tokens] int32, tokens generated so far.
        logprobs: [slots max_new_tokens] float32, their log-probabilities, or None if not requested.
        num_tokens: [slots] int32, number of tokens generated so far.
        max_tokens: [slots] int32, maximum number of tokens to generate.
        last_token: [slots] int32, newest token, which is not in the cache yet; at first, the last
            token of the prompt.
        position: [slots] int32, position of the newest token.
        active: [slots] bool, whether the sequence is unfinished.
        stopped: [slots] bool, whether a stop token ended the sequence; it is not in `tokens`.
        sample_id: [slots] int32, id that is folded into the sequence's random keys.
    """

    cache: list[dict[str, Leaf]]
    tokens: Leaf
    logprobs: Leaf | None
    num_tokens: Leaf
    max_tokens: Leaf
    last_token: Leaf
    position: Leaf
    active: Leaf
    stopped: Leaf
    sample_id: Leaf


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class NewSequences:
    """Sequences to insert into slots; all fields are [batch] int32.

    A row for padding has the slot number `slots`, which does not exist, so its writes are dropped.

    Attributes:
        slot: slot of the sequence.
        last_token: last token of the prompt.
        position: position of that token.
        max_tokens: maximum number of tokens to generate.
        sample_id: id that is folded into the sequence's random keys.
    """

    slot: jax.Array | np.ndarray
    last_token: jax.Array | np.ndarray
    position: jax.Array | np.ndarray
    max_tokens: jax.Array | np.ndarray
    sample_id: jax.Array | np.ndarray


def init_state(
    config: ModelConfig,
    *,
    slots: int,
    cache_length: int,
    max_new_tokens: int,
    dtype: DTypeLike,
    logprobs: bool,
) -> DecodeState:
    """Return a state with all slots free.

    Args:
        config: config of the model.
        slots: number of sequences decoded at the same time.
        cache_length: positions per slot in the KV cache.
        max_new_tokens: maximum number of tokens to generate per sequence.
        dtype: dtype of the KV cache.
        logprobs: whether to keep log-probabilities.
    """
    heads, head_dim = config.num_kv_heads, config.head_dim

    def layer() -> dict[str, jax.Array]:
        return {
            "k": jnp.zeros((slots, heads, head_dim, cache_length), dtype),
            "v": jnp.zeros((slots, heads, cache_length, head_dim), dtype),
        }

    def zeros(dtype: DTypeLike = jnp.int32) -> jax.Array:
        return jnp.zeros((slots,), dtype)

    return DecodeState(
        cache=[layer() for _ in range(config.num_layers)],
        tokens=jnp.zeros((slots, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((slots, max_new_tokens), jnp.float32) if logprobs else None,
        num_tokens=zeros(),
        max_tokens=zeros(),
        last_token=zeros(),
        position=zeros(),
        active=zeros(bool),
        stopped=zeros(bool),
        sample_id=zeros(),
    )


def state_sharding(state: DecodeState, mesh: Mesh) -> DecodeState:
    """Return the sharding of a state: slots over `data`, the cache's heads over `tensor`.

    On a TPU, the key cache is laid out in memory like the value cache. The decoding loop uses that
    layout for updates, and would otherwise transpose the key cache at its start and its end.
    """
    transposed = mesh.devices.flat[0].platform in TRANSPOSED_KEY_PLATFORMS
    cache = []
    for layer in state.cache:
        key = sharding_of(layer["k"].shape, ("batch", "kv_heads", "head_dim", "keys"), mesh)
        value = sharding_of(layer["v"].shape, ("batch", "kv_heads", "keys", "head_dim"), mesh)
        cache.append({"k": Format(Layout((0, 1, 3, 2)), key) if transposed else key, "v": value})
    by_slot = jax.tree.map(lambda leaf: batch_sharding(mesh, leaf.shape[0]), state)
    return dataclasses.replace(by_slot, cache=cache)


def insert(state: DecodeState, new: NewSequences) -> DecodeState:
    """Start sequences whose prompts are already in the cache of their slots.

    The newest token of a new sequence is the last token of its prompt. The first decode step
    computes that token again, so that the same executable generates every new token.
    """

    def update(old: jax.Array, values: jax.Array | np.ndarray | int | bool) -> jax.Array:
        return old.at[new.slot].set(values, mode="drop")

    return dataclasses.replace(
        state,
        num_tokens=update(state.num_tokens, 0),
        max_tokens=update(state.max_tokens, new.max_tokens),
        last_token=update(state.last_token, new.last_token),
        position=update(state.position, new.position),
        active=update(state.active, True),
        stopped=update(state.stopped, False),
        sample_id=update(state.sample_id, new.sample_id),
    )


def append_tokens(
    state: DecodeState,
    tokens: Int[Array, " slots"],
    logprobs: Float[Array, " slots"] | None,
    stop_token_ids: Int[Array, " stop"],
) -> DecodeState:
    """Append one token to every active slot, and finish sequences at a stop token or their limit.

    Args:
        state: state of the slots.
        tokens: sampled tokens; those of inactive slots are ignored.
        logprobs: log-probabilities of the tokens, if the state keeps them.
        stop_token_ids: tokens that end a sequence.
    """
    rows = jnp.arange(tokens.shape[0])
    is_stop = jnp.isin(tokens, stop_token_ids)
    kept = state.active & ~is_stop
    # Slots without a new token write beyond the end, where writes are dropped.
    column = jnp.where(kept, state.num_tokens, state.tokens.shape[1])
    num_tokens = state.num_tokens + kept
    active = kept & (num_tokens < state.max_tokens)
    all_logprobs = state.logprobs
    if all_logprobs is not None:
        all_logprobs = all_logprobs.at[rows, column].set(logprobs, mode="drop")
    return dataclasses.replace(
        state,
        tokens=state.tokens.at[rows, column].set(tokens, mode="drop"),
        logprobs=all_logprobs,
        num_tokens=num_tokens,
        last_token=jnp.where(active, tokens, state.last_token),
        position=state.position + active,
        active=active,
        stopped=state.stopped | (state.active & is_stop),
    )
