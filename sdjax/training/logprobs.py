"""Log-probabilities of given tokens.

Axes: B batch, T tokens, G parts of a batch, K tokens predicted of each, D hidden, V vocabulary, N
chunks, C tokens a chunk.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange

from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.transformer import KVCache, forward, unembed

# Logits that exist at once, 64 MiB: enough for a matrix product to run at its full speed.
LOGITS = 1 << 24


def token_logprobs(
    params: dict,
    adapter: Adapter | None,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    positions: jax.Array,
    segments: jax.Array | None = None,
    prefix: jax.Array | None = None,
    at: jax.Array | None = None,
) -> jax.Array:
    """The log-probability of each token given those before it: [B, T - 1] float32.

    Entry t belongs to token t + 1. With `at` [G, K] int32 it is [G, K], of those entries alone: the
    batch is taken in G equal parts, the rows of each laid end to end. With `prefix` [P] int32 all
    rows stand behind those tokens, which are computed once; their positions begin at P, and they
    have no segments.
    """
    cache = reach = None
    if prefix is not None:
        reach = len(prefix) + tokens.shape[1]
        cache = _prefix_cache(params, adapter, prefix, rows=len(tokens), reach=reach, config=config)
    hidden, _ = forward(
        params,
        adapter,
        tokens,
        config=config,
        positions=positions,
        segments=segments,
        cache=cache,
        max_length=reach,
    )
    if at is None:
        states, targets = hidden[:, :-1], tokens[:, 1:]
    else:
        joined = rearrange(hidden, "(g b) t d -> g (b t) d", g=len(at))
        states = jnp.take_along_axis(joined, at[..., None], axis=1)  # [G, K, D]
        joined = rearrange(tokens, "(g b) t -> g (b t)", g=len(at))
        # The last place has none behind it, and weight 0.
        targets = jnp.take_along_axis(joined, at + 1, axis=1, mode="clip")
    return target_logprobs(partial(unembed, config=config), head_of(params), states, targets)


def _prefix_cache(
    params: dict,
    adapter: Adapter | None,
    prefix: jax.Array,
    *,
    rows: int,
    reach: int,
    config: ModelConfig,
) -> KVCache:
    """The prefix's keys and values for `rows` rows, with room for `reach` tokens."""
    positions = jnp.arange(len(prefix))[None]
    _, entries = forward(
        params, adapter, prefix[None], config=config, positions=positions, max_length=reach
    )

    def shared(entry: jax.Array, axis: int) -> jax.Array:
        room = [(0, 0)] * entry.ndim
        room[axis] = (0, reach - len(prefix))
        roomy = jnp.pad(entry, room)
        return jnp.broadcast_to(roomy, (rows, *roomy.shape[1:]))

    return [{"k": shared(one["k"], 3), "v": shared(one["v"], 2)} for one in entries]


def head_of(params: dict) -> dict:
    """The tensors that logits are made with."""
    return {name: leaf for name, leaf in params.items() if name.startswith("lm_head")} or {
        "embed": params["embed"]
    }


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def target_logprobs(
    unembed: Callable[[Any, jax.Array], jax.Array], head: Any, states: jax.Array, targets: jax.Array
) -> jax.Array:
    """The target's logit minus the logsumexp of all, in float32.

    A chunk of tokens at a time, forwards and backwards: no array of G x K x V exists.

    Args:
        unembed: `(head, states [..., D]) -> logits [..., V]`, float32, each from its own state.
        head: a pytree of tensors.
        states: [G, K, D].
        targets: [G, K] int32.

    Returns:
        [G, K] float32.
    """

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _logprobs(unembed, head, *chunk)

    return _joined(jax.lax.map(of_chunk, _chunks(unembed, head, states, targets)), states)


def _forwards(unembed, head, states, targets):
    """The log-probabilities and, while the logits are there, their gradients by the states.

    A state is in one log-probability alone, so a loss can but scale its gradient: backwards needs
    logits only for the gradient by the head, and none where the head is frozen.
    """

    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        inputs, wanted = chunk
        logprobs, pull = jax.vjp(lambda x: _logprobs(unembed, head, x, wanted), inputs)
        (slopes,) = pull(jnp.ones_like(logprobs))
        return logprobs, slopes

    logprobs, slopes = _joined(
        jax.lax.map(of_chunk, _chunks(unembed, head, states, targets)), states
    )
    return logprobs, (head, states, targets, slopes)


def _backwards(unembed, kept, cotangent):
    head, states, targets, slopes = kept

    def add_chunk(total: Any, chunk: tuple) -> tuple[Any, None]:
        inputs, wanted, scales = chunk
        _, pull = jax.vjp(lambda weights: _logprobs(unembed, weights, inputs, wanted), head)
        return jax.tree.map(jnp.add, total, pull(scales)[0]), None

    chunks = _chunks(unembed, head, states, targets, cotangent)
    by_head, _ = jax.lax.scan(add_chunk, jax.tree.map(jnp.zeros_like, head), chunks)
    by_states = (slopes * cotangent[..., None]).astype(states.dtype)
    return by_head, by_states, None


target_logprobs.defvjp(_forwards, _backwards)


def _logprobs(unembed, head, states: jax.Array, targets: jax.Array) -> jax.Array:
    logits = unembed(head, states)  # [G, C, V]
    # As a masked sum: a vocabulary that is spread over devices stays where it is, and the gradient
    # is no scatter.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    chosen = jnp.where(is_target, logits, 0).sum(-1)
    return chosen - jax.nn.logsumexp(logits, axis=-1)


def _chunks(unembed, head, states: jax.Array, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each [G, K, ...] as [N, G, C, ...], padded.

    Cut along the tokens, so that a batch that is spread over devices stays where it is.
    """
    parts, count = states.shape[:2]
    vocab_size = jax.eval_shape(unembed, head, states).shape[-1]
    chunks = -(-parts * count * vocab_size // LOGITS)
    padding = (0, -count % chunks)

    def cut(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, 0), padding] + [(0, 0)] * (array.ndim - 2))
        return rearrange(padded, "g (n c) ... -> n g c ...", n=chunks)

    return tuple(cut(array) for array in (states, *arrays))


def _joined(chunked: Any, states: jax.Array) -> Any:
    """The inverse of `_chunks`."""
    count = states.shape[1]
    return jax.tree.map(lambda x: rearrange(x, "n g c ... -> g (n c) ...")[:, :count], chunked)
