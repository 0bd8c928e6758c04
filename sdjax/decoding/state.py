"""What the slots of a decoder hold between two compiled calls.

Axes: B slots, R rows admitted at once, M most new tokens, S cached positions, K key-value heads,
H head dimension.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sdjax.models.config import ModelConfig
from sdjax.models.transformer import KVCache


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The slots of a decoder.

    Attributes:
        cache: keys and values a layer, [B, S, K, H].
        produced: [B, M] int32, the tokens produced so far.
        count: [B] int32, how many they are.
        last: [B] int32, the newest token, not in the cache yet.
        position: [B] int32, where the newest token goes.
        active: [B] bool, whether the slot is still producing.
        stopped: [B] bool, whether it ended by a stop token (which is not among `produced`).
        example: [B] int32, the index of the prompt, from which random keys are folded.
    """

    cache: KVCache
    produced: jax.Array
    count: jax.Array
    last: jax.Array
    position: jax.Array
    active: jax.Array
    stopped: jax.Array
    example: jax.Array


def empty_state(
    config: ModelConfig, *, slots: int, cached: int, max_new_tokens: int, dtype: jnp.dtype
) -> State:
    """All slots free."""

    def entry() -> jax.Array:
        return jnp.zeros((slots, cached, config.num_kv_heads, config.head_dim), dtype)

    def numbers() -> jax.Array:
        return jnp.zeros((slots,), jnp.int32)

    return State(
        cache=[{"k": entry(), "v": entry()} for _ in range(config.num_layers)],
        produced=jnp.zeros((slots, max_new_tokens), jnp.int32),
        count=numbers(),
        last=numbers(),
        position=numbers(),
        active=jnp.zeros((slots,), bool),
        stopped=jnp.zeros((slots,), bool),
        example=numbers(),
    )


def append(state: State, tokens: jax.Array, stops: jax.Array) -> State:
    """Records the newest token of every active slot and decides which go on.

    Args:
        state: the slots.
        tokens: [B] int32, the chosen tokens; those of inactive slots are ignored.
        stops: [n] int32, the tokens that end a sequence.
    """
    rows = jnp.arange(tokens.shape[0])
    limit = state.produced.shape[1]
    is_stop = jnp.isin(tokens, stops)
    kept = state.active & ~is_stop
    # A slot that keeps nothing writes beyond the end, where the write is dropped.
    column = jnp.where(kept, state.count, limit)
    count = state.count + kept
    return dataclasses.replace(
        state,
        produced=state.produced.at[rows, column].set(tokens, mode="drop"),
        count=count,
        last=jnp.where(kept, tokens, state.last),
        active=kept & (count < limit),
        stopped=state.stopped | (state.active & is_stop),
    )
