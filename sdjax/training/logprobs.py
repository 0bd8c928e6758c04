"""Log-probabilities of given tokens.

Axes: B batch, T tokens, D hidden, V vocabulary, C tokens a chunk and row.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from einops import rearrange

from sdjax.models.adapter import Adapter
from sdjax.models.config import ModelConfig
from sdjax.models.transformer import forward, unembed

# Logits of about this many tokens exist at once, forwards and backwards.
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
    # Chunks are cut along the tokens, so that a batch spread over devices stays where it is.
    steps = tokens.shape[1] - 1
    chunks = -(-tokens.shape[0] * steps // CHUNK)
    padding = -steps % chunks
    states = jnp.pad(hidden[:, :-1], ((0, 0), (0, padding), (0, 0)))
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, padding)))
    states = rearrange(states, "b (n c) d -> n b c d", n=chunks)
    targets = rearrange(targets, "b (n c) -> n b c", n=chunks)

    @jax.checkpoint
    def of_chunk(chunk: tuple[jax.Array, jax.Array]) -> jax.Array:
        logits = unembed(params, chunk[0], config=config)  # [B, C, V]
        chosen = jnp.take_along_axis(logits, chunk[1][..., None], axis=-1)[..., 0]
        return chosen - jax.nn.logsumexp(logits, axis=-1)

    logprobs = jax.lax.map(of_chunk, (states, targets))
    return rearrange(logprobs, "n b c -> b (n c)")[:, :steps]
