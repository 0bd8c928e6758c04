"""Log-probabilities of given tokens.

Axes: B batch, T tokens, D hidden, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from sdjax.models.adapter import Adapter
from sdjax.models.config import ModelConfig
from sdjax.models.transformer import forward, unembed

# Logits of this many tokens exist at once, forwards and backwards.
CHUNK = 4096


def token_logprobs(
    params: dict,
    adapter: Adapter | None,
    tokens: jax.Array,
    *,
    config: ModelConfig,
    positions: jax.Array,
    segments: jax.Array | None = None,
) -> jax.Array:
    """The log-probability of each token given those before it: [B, T - 1] float32.

    Entry t belongs to token t + 1. As the target's logit minus the logsumexp, in float32, a
    chunk of tokens at a time, so that no [B, T, V] array exists.
    """
    hidden, _ = forward(
        params, adapter, tokens, config=config, positions=positions, segments=segments
    )
    batch, length = tokens.shape
    states = rearrange(hidden[:, :-1], "b t d -> (b t) d")
    targets = rearrange(tokens[:, 1:], "b t -> (b t)")
    padding = -states.shape[0] % min(CHUNK, states.shape[0])
    chunks = -(-states.shape[0] // CHUNK)
    states = rearrange(jnp.pad(states, ((0, padding), (0, 0))), "(n c) d -> n c d", n=chunks)
    targets = rearrange(jnp.pad(targets, (0, padding)), "(n c) -> n c", n=chunks)

    @jax.checkpoint
    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = unembed(params, chunk[0])  # [C, V]
        chosen = jnp.take_along_axis(logits, chunk[1][:, None], axis=-1)[:, 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    flat = jax.lax.map(of_chunk, (states, targets)).reshape(-1)
    return flat[: batch * (length - 1)].reshape(batch, length - 1)
