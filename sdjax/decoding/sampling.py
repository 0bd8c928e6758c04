"""From logits to the next token.

Axes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most probable one.

    Attributes:
        temperature: divides the logits.
        top_p: keeps the smallest set of tokens whose probabilities sum to at least this
            (nucleus sampling, Holtzman et al. 2020), after the temperature; 1 keeps all.
    """

    temperature: float = 0.0
    top_p: float = 1.0

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0


def sample(
    logits: jax.Array, keys: jax.Array, temperature: jax.Array, top_p: jax.Array | None
) -> jax.Array:
    """Draws one token a row: [B] int32 from logits [B, V], by one key a row."""
    scaled = logits / temperature
    if top_p is not None:
        scaled = jnp.where(nucleus(scaled, top_p), scaled, -jnp.inf)
    return jax.vmap(jax.random.categorical)(keys, scaled).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """The tokens of the smallest set that holds `top_p` of the probability: [B, V] bool."""
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    # The mass before a token decides, so that the most probable token always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    kept = before < top_p
    return jnp.take_along_axis(kept, jnp.argsort(order, axis=-1), axis=-1)
