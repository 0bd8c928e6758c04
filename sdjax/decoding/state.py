"""What the slots of a decoder hold between two compiled calls.

Axes: B slots, M most new tokens, S cached positions, K key-value heads, H head dimension.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import Mesh

from sdjax.models.config import ModelConfig
from sdjax.models.transformer import KVCache
from sdjax.sharding.rules import batch_sharding, sharding_of

KEYS_TURNED = ("tpu",)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class State:
    """The slots of a decoder.

    Attributes:
        cache: keys [B, K, H, S] and values [B, K, S, H] a layer.
        produced: [B, M] int32, the tokens produced so far.
        logprobs: [B, M] float32, their log-probabilities, or None where nobody asked.
        count: [B] int32, how many they are.
        limit: [B] int32, how many they may be.
        last: [B] int32, the newest token, not in the cache yet; the prompt's last one at first.
        position: [B] int32, where the newest token stands.
        active: [B] bool, whether the slot is still producing.
        stopped: [B] bool, whether it ended by a stop token (which is not among `produced`).
        example: [B] int32, the number of the prompt, from which random keys are folded.
    """

    cache: KVCache
    produced: jax.Array
    logprobs: jax.Array | None
    count: jax.Array
    limit: jax.Array
    last: jax.Array
    position: jax.Array
    active: jax.Array
    stopped: jax.Array
    example: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Seats:
    """Sequences that begin, each in its slot; all [n] int32.

    A row without a sequence names slot number B, which is none, so that what it writes is dropped.

    Attributes:
        slot: where the sequence is to stand.
        last: the last token of its prompt.
        position: where that stands.
        limit: the most new tokens.
        example: the number of the prompt.
    """

    slot: jax.Array | np.ndarray
    last: jax.Array | np.ndarray
    position: jax.Array | np.ndarray
    limit: jax.Array | np.ndarray
    example: jax.Array | np.ndarray


def empty_state(
    config: ModelConfig,
    *,
    slots: int,
    cached: int,
    max_new_tokens: int,
    dtype: jnp.dtype,
    logprobs: bool,
) -> State:
    """All slots free."""

    heads, size = config.num_kv_heads, config.head_dim

    def layer() -> dict[str, jax.Array]:
        return {
            "k": jnp.zeros((slots, heads, size, cached), dtype),
            "v": jnp.zeros((slots, heads, cached, size), dtype),
        }

    def numbers() -> jax.Array:
        return jnp.zeros((slots,), jnp.int32)

    return State(
        cache=[layer() for _ in range(config.num_layers)],
        produced=jnp.zeros((slots, max_new_tokens), jnp.int32),
        logprobs=jnp.zeros((slots, max_new_tokens), jnp.float32) if logprobs else None,
        count=numbers(),
        limit=numbers(),
        last=numbers(),
        position=numbers(),
        active=jnp.zeros((slots,), bool),
        stopped=jnp.zeros((slots,), bool),
        example=numbers(),
    )


def state_sharding(state: State, mesh: Mesh) -> State:
    """Slots over `data`, and the heads of the cache over `tensor`, as the projections are.

    On a TPU, keys lie in memory as values do: a loop that adds to them has them so, and would turn
    them round whenever it begins and ends.
    """
    turned = mesh.devices.flat[0].platform in KEYS_TURNED
    cache = []
    for layer in state.cache:
        key = sharding_of(layer["k"].shape, ("batch", "kv_heads", "head_dim", "keys"), mesh)
        value = sharding_of(layer["v"].shape, ("batch", "kv_heads", "keys", "head_dim"), mesh)
        cache.append({"k": Format(Layout((0, 1, 3, 2)), key) if turned else key, "v": value})
    by_slot = jax.tree.map(lambda leaf: batch_sharding(mesh, leaf.shape[0]), state)
    return dataclasses.replace(by_slot, cache=cache)


def seat(state: State, seats: Seats) -> State:
    """Begins sequences whose prompts are in the cache of their slots already.

    A sequence begins with its prompt's last token as the newest one: the first step computes
    that token again, so that every new token comes from the same program.
    """

    def put(old: jax.Array, new: jax.Array | np.ndarray | int | bool) -> jax.Array:
        return old.at[seats.slot].set(new, mode="drop")

    return dataclasses.replace(
        state,
        count=put(state.count, 0),
        limit=put(state.limit, seats.limit),
        last=put(state.last, seats.last),
        position=put(state.position, seats.position),
        active=put(state.active, True),
        stopped=put(state.stopped, False),
        example=put(state.example, seats.example),
    )


def append(state: State, tokens: jax.Array, logprobs: jax.Array | None, stops: jax.Array) -> State:
    """Records the newest token of every active slot and decides which go on.

    Args:
        state: the slots.
        tokens: [B] int32, the chosen tokens; those of inactive slots are ignored.
        logprobs: [B] float32, their log-probabilities, where the state keeps them.
        stops: [n] int32, the tokens that end a sequence.
    """
    rows = jnp.arange(tokens.shape[0])
    is_stop = jnp.isin(tokens, stops)
    kept = state.active & ~is_stop
    # A slot that keeps nothing writes beyond the end, where the write is dropped.
    column = jnp.where(kept, state.count, state.produced.shape[1])
    count = state.count + kept
    active = kept & (count < state.limit)
    kept_logprobs = state.logprobs
    if kept_logprobs is not None:
        kept_logprobs = kept_logprobs.at[rows, column].set(logprobs, mode="drop")
    return dataclasses.replace(
        state,
        produced=state.produced.at[rows, column].set(tokens, mode="drop"),
        logprobs=kept_logprobs,
        count=count,
        last=jnp.where(active, tokens, state.last),
        position=state.position + active,
        active=active,
        stopped=state.stopped | (state.active & is_stop),
    )
