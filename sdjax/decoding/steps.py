"""Step functions that a decoder compiles: pure functions of the weights and the slots' state.

Axes: stop (token ids that end a sequence); the others are in `sdjax.models.types`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from sdjax.decoding.sampling import sample_tokens
from sdjax.decoding.state import DecodeState, NewSequences, append_tokens, insert
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.transformer import forward, unembed
from sdjax.models.types import KVCache, Params


def prefill_prefix(
    params: Params,
    adapter: Adapter | None,
    state: DecodeState,
    prefix: Int[Array, " time"],
    *,
    config: ModelConfig,
) -> DecodeState:
    """Compute the shared prefix and write it to the cache of every slot, where it remains."""
    if not len(prefix):
        return state
    cache_length = state.cache[0]["v"].shape[2]
    positions = jnp.arange(len(prefix))[None]
    _, prefix_cache = forward(
        params, adapter, prefix[None], config=config, positions=positions, max_length=cache_length
    )
    return dataclasses.replace(state, cache=_write(state.cache, slice(None), prefix_cache))


def prefill(
    params: Params,
    adapter: Adapter | None,
    state: DecodeState,
    tokens: Int[Array, "batch time"],
    new: NewSequences,
    *,
    config: ModelConfig,
    prefix_length: int,
) -> DecodeState:
    """Compute padded prompts and start their sequences.

    Args:
        params: parameters of the model.
        adapter: LoRA adapter or None.
        state: state of the slots.
        tokens: prompts without the prefix, padded to their bucket on the right.
        new: slots and limits of the sequences.
        config: config of the model.
        prefix_length: number of prefix tokens in the cache of every slot.
    """
    cache_length = state.cache[0]["v"].shape[2]
    tokens = tokens[:, : cache_length - prefix_length]  # a bucket may exceed the context
    positions = prefix_length + jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    prompt_cache = None
    if prefix_length:
        end = prefix_length + tokens.shape[1]
        prompt_cache = [
            {"k": layer["k"][new.slot, ..., :end], "v": layer["v"][new.slot, :, :end]}
            for layer in state.cache
        ]
    _, prompt_cache = forward(
        params,
        adapter,
        tokens,
        config=config,
        positions=positions,
        cache=prompt_cache,
        max_length=cache_length,
    )
    cache = _write(state.cache, new.slot, prompt_cache)
    return insert(dataclasses.replace(state, cache=cache), new)


def fork(state: DecodeState, new: NewSequences, source_slots: Int[Array, " batch"]) -> DecodeState:
    """Start sequences with prompts copied from the cache of other slots."""

    def copy(old: jax.Array) -> jax.Array:
        return old.at[new.slot].set(old[source_slots], mode="drop")

    return insert(dataclasses.replace(state, cache=jax.tree.map(copy, state.cache)), new)


def decode_step(
    params: Params,
    adapter: Adapter | None,
    state: DecodeState,
    key: Key[Array, ""],
    sampling_params: dict[str, jax.Array],
    top_k: int | None,
    stop_token_ids: Int[Array, " stop"],
    *,
    config: ModelConfig,
) -> DecodeState:
    """Generate one token for every active slot.

    Args:
        params: parameters of the model.
        adapter: LoRA adapter or None.
        state: state of the slots.
        key: base key, into which sample ids and positions are folded.
        sampling_params: result of `Sampling.scalar_params`; empty for greedy decoding.
        top_k: number of most probable tokens to sample from, or None.
        stop_token_ids: tokens that end a sequence.
        config: config of the model.
    """
    hidden, cache = forward(
        params,
        adapter,
        state.last_token[:, None],
        config=config,
        positions=state.position[:, None],
        cache=state.cache,
    )
    logits = unembed(params, hidden[:, 0], config=config)  # [slots vocab]
    tokens = _next_tokens(logits, state, key, sampling_params, top_k)
    logprobs = None
    if state.logprobs is not None:
        token_logits = jnp.take_along_axis(logits, tokens[:, None], axis=-1)[:, 0]
        logprobs = token_logits - jax.nn.logsumexp(logits, axis=-1)
    return append_tokens(dataclasses.replace(state, cache=cache), tokens, logprobs, stop_token_ids)


def decode_round(
    params: Params,
    adapter: Adapter | None,
    state: DecodeState,
    occupied: Bool[Array, " slots"],
    max_active: Int[Array, ""],
    max_steps: Int[Array, ""],
    key: Key[Array, ""],
    sampling_params: dict[str, jax.Array],
    top_k: int | None,
    stop_token_ids: Int[Array, " stop"],
    *,
    config: ModelConfig,
) -> tuple[DecodeState, dict[str, Any]]:
    """Run decode steps until at most `max_active` of the occupied slots are active.

    Args:
        params: parameters of the model.
        adapter: LoRA adapter or None.
        state: state of the slots.
        occupied: slots that hold an unfinished sequence.
        max_active: number of active slots at which the round ends.
        max_steps: maximum number of steps.
        key: see `decode_step`, like the remaining arguments.
        sampling_params: see `decode_step`.
        top_k: see `decode_step`.
        stop_token_ids: see `decode_step`.
        config: config of the model.

    Returns:
        The new state, and the arrays that the host reads: the number of steps and some fields of
        the state.
    """

    def continues(carry: tuple[DecodeState, jax.Array]) -> jax.Array:
        state, steps = carry
        return (jnp.sum(state.active) > max_active) & (steps < max_steps)

    def step(carry: tuple[DecodeState, jax.Array]) -> tuple[DecodeState, jax.Array]:
        state, steps = carry
        state = decode_step(
            params, adapter, state, key, sampling_params, top_k, stop_token_ids, config=config
        )
        return state, steps + 1

    state = dataclasses.replace(state, active=state.active & occupied)
    state, steps = jax.lax.while_loop(continues, step, (state, jnp.int32(0)))
    names = ("active", "num_tokens", "tokens", "stopped", "logprobs")
    return state, {"steps": steps} | {name: getattr(state, name) for name in names}


def _write(cache: KVCache, slots: jax.Array | np.ndarray | slice, new: KVCache) -> KVCache:
    """Return the cache with the first positions of some slots replaced."""

    def update(old: jax.Array, values: jax.Array) -> jax.Array:
        index = tuple(slice(size) for size in values.shape[1:])
        return old.at[slots, *index].set(values, mode="drop")

    return jax.tree.map(update, cache, new)


def _next_tokens(
    logits: Float[Array, "slots vocab"],
    state: DecodeState,
    key: Key[Array, ""],
    sampling_params: dict[str, jax.Array],
    top_k: int | None,
) -> Int[Array, " slots"]:
    if not sampling_params:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)

    def fold_in(sample_id: jax.Array, position: jax.Array) -> jax.Array:
        return jax.random.fold_in(jax.random.fold_in(key, sample_id), position)

    keys = jax.vmap(fold_in)(state.sample_id, state.position + 1)
    return sample_tokens(logits, keys, top_k=top_k, **sampling_params)
