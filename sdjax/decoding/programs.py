"""What a decoder compiles: pure functions of weights and slots.

Axes: B slots, R prompts computed at once, P bucket (padded prompt length), V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sdjax.decoding.sampling import draw
from sdjax.decoding.state import Seats, State, append, seat
from sdjax.models.adapter import Adapter
from sdjax.models.config import ModelConfig
from sdjax.models.transformer import forward, unembed

Numbers = dict[str, jax.Array]


def admit(
    params: dict,
    adapter: Adapter | None,
    state: State,
    tokens: jax.Array,
    seats: Seats,
    *,
    config: ModelConfig,
) -> State:
    """Computes padded prompts [R, P] and seats their sequences."""
    cached = state.cache[0]["v"].shape[2]
    tokens = tokens[:, :cached]  # a bucket may be longer than the context
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    _, fresh = forward(params, adapter, tokens, config=config, positions=positions, reach=cached)

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        place = tuple(slice(size) for size in new.shape[1:])
        return old.at[seats.slot, *place].set(new, mode="drop")

    return seat(dataclasses.replace(state, cache=jax.tree.map(put, state.cache, fresh)), seats)


def share(state: State, seats: Seats, sources: jax.Array) -> State:
    """Seats sequences whose prompts are in the cache of the slots `sources` [B]."""

    def copy(old: jax.Array) -> jax.Array:
        return old.at[seats.slot].set(old[sources], mode="drop")

    return seat(dataclasses.replace(state, cache=jax.tree.map(copy, state.cache)), seats)


def step(
    params: dict,
    adapter: Adapter | None,
    state: State,
    key: jax.Array,
    numbers: Numbers,
    top_k: int | None,
    stops: jax.Array,
    *,
    config: ModelConfig,
) -> State:
    """One more token for every active slot; greedy without `numbers` of a `Sampling`."""
    hidden, cache = forward(
        params,
        adapter,
        state.last[:, None],
        config=config,
        positions=state.position[:, None],
        cache=state.cache,
    )
    logits = unembed(params, hidden[:, 0], config=config)  # [B, V]
    tokens = _choose(logits, state, key, numbers, top_k)
    logprobs = None
    if state.logprobs is not None:
        chosen = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        logprobs = chosen - jax.nn.logsumexp(logits, axis=-1)
    return append(dataclasses.replace(state, cache=cache), tokens, logprobs, stops)


def advance(
    params: dict,
    adapter: Adapter | None,
    state: State,
    owned: jax.Array,
    enough: jax.Array,
    most_steps: jax.Array,
    key: jax.Array,
    numbers: Numbers,
    top_k: int | None,
    stops: jax.Array,
    *,
    config: ModelConfig,
) -> tuple[State, dict]:
    """Lets the owned slots [B] produce until at most `enough` of them are left.

    Returns:
        the slots, and what the host reads of them.
    """

    def unfinished(carry: tuple[State, jax.Array]) -> jax.Array:
        state, steps = carry
        return (jnp.sum(state.active) > enough) & (steps < most_steps)

    def one(carry: tuple[State, jax.Array]) -> tuple[State, jax.Array]:
        state, steps = carry
        state = step(params, adapter, state, key, numbers, top_k, stops, config=config)
        return state, steps + 1

    state = dataclasses.replace(state, active=state.active & owned)
    state, steps = jax.lax.while_loop(unfinished, one, (state, jnp.int32(0)))
    names = ("active", "count", "produced", "stopped", "logprobs")
    return state, {"steps": steps} | {name: getattr(state, name) for name in names}


def _choose(
    logits: jax.Array, state: State, key: jax.Array, numbers: Numbers, top_k: int | None
) -> jax.Array:
    if not numbers:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def fold(example: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, example), position)

    keys = jax.vmap(fold)(state.example, state.position + 1)
    return draw(logits, keys, top_k=top_k, **numbers)
