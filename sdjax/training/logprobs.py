"""Log-probabilities of given tokens, computed in chunks so that the full logits never exist.

Axes: see `sdjax.training.types`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.transformer import KVCache, forward, unembed
from sdjax.models.types import Params

# Maximum number of logits per chunk (64 MiB); enough for a matrix product to run at full speed.
MAX_LOGITS = 1 << 24

# (head, states) -> logits
Unembed = Callable[[Any, jax.Array], jax.Array]


def token_logprobs(
    params: Params,
    adapter: Adapter | None,
    tokens: Int[Array, "batch time"],
    *,
    config: ModelConfig,
    positions: Int[Array, "batch time"],
    segments: Int[Array, "batch time"] | None = None,
    prefix: Int[Array, " prefix"] | None = None,
    target_index: Int[Array, "parts targets"] | None = None,
    warp: Callable[[jax.Array], jax.Array] | None = None,
) -> Float[Array, "batch time-1"] | Float[Array, "parts targets"]:
    """Return the log-probability of each token given the tokens before it, in float32.

    Args:
        params: weights of the model.
        adapter: LoRA factors to add to the projections, or None.
        tokens: input tokens; entry t of the result is for token t + 1.
        config: architecture of the model.
        positions: position of each token in its sequence.
        segments: segment id of each token in a packed row.
        prefix: tokens that precede every row; their keys and values are computed once. `positions`
            must then start at the length of the prefix, and `segments` must be None.
        target_index: restricts the result to these entries. The batch is divided into `parts`
            equal parts, and the rows of each part are concatenated before indexing.
        warp: maps logits [..., tokens, vocab] to those of another distribution, such as the one
            that tokens were sampled from.
    """
    cache = max_length = None
    if prefix is not None:
        max_length = len(prefix) + tokens.shape[1]
        cache = _prefix_cache(
            params, adapter, prefix, rows=len(tokens), max_length=max_length, config=config
        )
    hidden, _ = forward(
        params,
        adapter,
        tokens,
        config=config,
        positions=positions,
        segments=segments,
        cache=cache,
        max_length=max_length,
    )
    if target_index is None:
        states, targets = hidden[:, :-1], tokens[:, 1:]
    else:
        parts = len(target_index)
        joined = rearrange(hidden, "(g b) t d -> g (b t) d", g=parts)
        states = jnp.take_along_axis(joined, target_index[..., None], axis=1)
        joined = rearrange(tokens, "(g b) t -> g (b t)", g=parts)
        # The last entry has no next token; its weight is 0.
        targets = jnp.take_along_axis(joined, target_index + 1, axis=1, mode="clip")
    project = partial(unembed, config=config)

    def logits_of(head: Any, states: jax.Array) -> jax.Array:
        logits = project(head, states)
        return logits if warp is None else warp(logits)

    return target_logprobs(logits_of, head_params(params), states, targets)


def _prefix_cache(
    params: Params,
    adapter: Adapter | None,
    prefix: jax.Array,
    *,
    rows: int,
    max_length: int,
    config: ModelConfig,
) -> KVCache:
    """Return the keys and values of the prefix, repeated for `rows` rows of `max_length` tokens."""
    positions = jnp.arange(len(prefix))[None]
    _, cache = forward(
        params, adapter, prefix[None], config=config, positions=positions, max_length=max_length
    )

    def expand(entry: jax.Array, axis: int) -> jax.Array:
        padding = [(0, 0)] * entry.ndim
        padding[axis] = (0, max_length - len(prefix))
        padded = jnp.pad(entry, padding)
        return jnp.broadcast_to(padded, (rows, *padded.shape[1:]))

    return [{"k": expand(layer["k"], 3), "v": expand(layer["v"], 2)} for layer in cache]


def head_params(params: Params) -> Params:
    """Return the tensors that compute logits: the LM head, or the embedding if they are tied."""
    return {name: leaf for name, leaf in params.items() if name.startswith("lm_head")} or {
        "embed": params["embed"]
    }


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def target_logprobs(
    unembed: Unembed,
    head: Any,
    states: Float[Array, "parts targets hidden"],
    targets: Int[Array, "parts targets"],
) -> Float[Array, "parts targets"]:
    """Return the logit of each target minus the logsumexp of all logits, in float32.

    Forward and backward passes work on one chunk of tokens at a time, so no array of
    parts x targets x vocab exists.

    Args:
        unembed: maps (head, states [..., hidden]) to float32 logits [..., vocab], independently
            for each state.
        head: pytree of the tensors that compute logits.
        states: final hidden states.
        targets: token ids.
    """

    def chunk_logprobs(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        return _logprobs(unembed, head, *chunk)

    chunks = _split_chunks(unembed, head, states, targets)
    return _join_chunks(jax.lax.map(chunk_logprobs, chunks), states)


def _forward_rule(
    unembed: Unembed, head: Any, states: jax.Array, targets: jax.Array
) -> tuple[jax.Array, tuple]:
    """Return the log-probabilities, and residuals that include their gradient w.r.t. the states.

    Each state affects only one log-probability, so a loss can only scale its gradient. The backward
    pass therefore recomputes logits only for the gradient w.r.t. the head; none if it is frozen.
    """

    def chunk_logprobs(chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        chunk_states, chunk_targets = chunk
        logprobs, vjp = jax.vjp(
            lambda states: _logprobs(unembed, head, states, chunk_targets), chunk_states
        )
        (gradient,) = vjp(jnp.ones_like(logprobs))
        return logprobs, gradient

    chunks = _split_chunks(unembed, head, states, targets)
    logprobs, gradient = _join_chunks(jax.lax.map(chunk_logprobs, chunks), states)
    return logprobs, (head, states, targets, gradient)


def _backward_rule(
    unembed: Unembed, residuals: tuple, cotangent: jax.Array
) -> tuple[Any, jax.Array, None]:
    head, states, targets, gradient = residuals

    def add_chunk(total: Any, chunk: tuple) -> tuple[Any, None]:
        chunk_states, chunk_targets, chunk_cotangent = chunk
        _, vjp = jax.vjp(lambda head: _logprobs(unembed, head, chunk_states, chunk_targets), head)
        return jax.tree.map(jnp.add, total, vjp(chunk_cotangent)[0]), None

    chunks = _split_chunks(unembed, head, states, targets, cotangent)
    head_gradient, _ = jax.lax.scan(add_chunk, jax.tree.map(jnp.zeros_like, head), chunks)
    return head_gradient, (gradient * cotangent[..., None]).astype(states.dtype), None


target_logprobs.defvjp(_forward_rule, _backward_rule)


def _logprobs(
    unembed: Unembed,
    head: Any,
    states: Float[Array, "parts chunk hidden"],
    targets: Int[Array, "parts chunk"],
) -> Float[Array, "parts chunk"]:
    logits = unembed(head, states)
    # A masked sum does not gather a sharded vocabulary, and its gradient is not a scatter.
    is_target = targets[..., None] == jnp.arange(logits.shape[-1])
    target_logits = jnp.where(is_target, logits, 0).sum(-1)
    return target_logits - jax.nn.logsumexp(logits, axis=-1)


def _split_chunks(
    unembed: Unembed, head: Any, states: jax.Array, *arrays: jax.Array
) -> tuple[jax.Array, ...]:
    """Reshape [parts, targets, ...] to padded [chunks, parts, chunk, ...].

    Splitting along the token axis does not reshard a batch that is sharded over devices.
    """
    parts, count = states.shape[:2]
    vocab_size = jax.eval_shape(unembed, head, states).shape[-1]
    chunks = -(-parts * count * vocab_size // MAX_LOGITS)
    padding = (0, -count % chunks)

    def split(array: jax.Array) -> jax.Array:
        padded = jnp.pad(array, [(0, 0), padding] + [(0, 0)] * (array.ndim - 2))
        return rearrange(padded, "g (n c) ... -> n g c ...", n=chunks)

    return tuple(split(array) for array in (states, *arrays))


def _join_chunks(chunked: Any, states: jax.Array) -> Any:
    """Invert `_split_chunks`."""
    count = states.shape[1]
    return jax.tree.map(lambda x: rearrange(x, "n g c ... -> g (n c) ...")[:, :count], chunked)
