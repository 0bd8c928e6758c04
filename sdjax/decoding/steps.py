"""What a decoder compiles: pure functions of weights and slots.

Axes: B slots, R prompts computed at once, L prefix that all prompts share, P bucket (padded length
of what follows it), V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.decoding.sampling import draw
from sdjax.decoding.state import Seats, State, append, seat
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.transformer import KVCache, forward, unembed

Numbers = dict[str, jax.Array]


def begin(
    params: dict, adapter: Adapter | None, state: State, prefix: jax.Array, *, config: ModelConfig
) -> State:
    """Computes the prefix [L] and puts it into every slot's cache, where it stays."""
    if not len(prefix):
        return state
    reach = state.cache[0]["v"].shape[2]
    positions = jnp.arange(len(prefix))[None]
    _, known = forward(
        params, adapter, prefix[None], config=config, positions=positions, max_length=reach
    )
    return dataclasses.replace(state, cache=_put(state.cache, slice(None), known))


def admit(
    params: dict,
    adapter: Adapter | None,
    state: State,
    tokens: jax.Array,
    seats: Seats,
    *,
    config: ModelConfig,
    prefix: int,
) -> State:
    """Computes what follows the prefix of `prefix` tokens, padded [R, P], and seats it."""
    cached = state.cache[0]["v"].shape[2]
    tokens = tokens[:, : cached - prefix]  # a bucket may be longer than the context
    positions = prefix + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    known = None
    if prefix:
        ends = prefix + tokens.shape[1]
        known = [
            {"k": layer["k"][seats.slot, ..., :ends], "v": layer["v"][seats.slot, :, :ends]}
            for layer in state.cache
        ]
    _, fresh = forward(
        params, adapter, tokens, config=config, positions=positions, cache=known, max_length=cached
    )
    return seat(dataclasses.replace(state, cache=_put(state.cache, seats.slot, fresh)), seats)


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


def _put(cache: KVCache, slots: jax.Array | np.ndarray | slice, fresh: KVCache) -> KVCache:
    """The cache with the beginnings of some slots replaced."""

    def put(old: jax.Array, new: jax.Array) -> jax.Array:
        place = tuple(slice(size) for size in new.shape[1:])
        return old.at[slots, *place].set(new, mode="drop")

    return jax.tree.map(put, cache, fresh)


def _choose(
    logits: jax.Array, state: State, key: jax.Array, numbers: Numbers, top_k: int | None
) -> jax.Array:
    if not numbers:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def fold(example: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, example), position)

    keys = jax.vmap(fold)(state.example, state.position + 1)
    return draw(logits, keys, top_k=top_k, **numbers)
