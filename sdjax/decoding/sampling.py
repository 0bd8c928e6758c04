"""From logits to the next token: pure functions that compose.

Each `keep_…` sets the logits of the tokens that it drops to minus infinity. In the order in which
`Sampling` applies them (temperature, top-k, top-p, min-p) they do what transformers' logits
warpers do, but for exact ties at the edge of top-p, which stay together here.

Axes: B batch, V vocabulary.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from sdjax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is drawn; temperature 0 takes the most probable one.

    Attributes:
        temperature: divides the logits.
        top_k: keeps the k most probable tokens; None keeps all.
        top_p: keeps the smallest set of tokens whose probabilities sum to at least this
            (nucleus sampling, Holtzman et al. 2020); 1 keeps all.
        min_p: keeps the tokens at least this times as probable as the most probable one
            (Nguyen et al. 2024, arXiv 2407.01082); 0 keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature is {self.temperature}: it must be 0 or more")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k is {self.top_k}: it must be 1 or more")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: it must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p is {self.min_p}: it must be 0 to 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0.0

    def numbers(self) -> dict[str, jax.Array]:
        """The arguments of `draw` that are in use, as scalars that compile nothing anew."""
        if self.greedy:
            return {}
        used = {"temperature": self.temperature}
        if self.top_p < 1:
            used["top_p"] = self.top_p
        if self.min_p > 0:
            used["min_p"] = self.min_p
        return {name: jnp.float32(value) for name, value in used.items()}


def draw(
    logits: jax.Array,
    keys: jax.Array,
    *,
    temperature: jax.Array,
    top_k: int | None = None,
    top_p: jax.Array | None = None,
    min_p: jax.Array | None = None,
) -> jax.Array:
    """Draws one token a row: [B] int32 from logits [B, V], by one key a row."""
    kept = logits / temperature
    if top_k is not None:
        kept = keep_top_k(kept, top_k)
    if top_p is not None:
        kept = keep_top_p(kept, top_p)
    if min_p is not None:
        kept = keep_min_p(kept, min_p)
    return jax.vmap(jax.random.categorical)(keys, kept).astype(jnp.int32)


def keep_top_k(logits: jax.Array, k: int) -> jax.Array:
    """The k highest logits [B, V], and those equal to the lowest of them."""
    least = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_top_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The smallest set of the highest logits [B, V] that holds `p` of the probability."""
    falling = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(falling, axis=-1)
    # The mass before a token decides, so that the most probable token always stays.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    least = jnp.min(jnp.where(before < p, falling, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= least, logits, -jnp.inf)


def keep_min_p(logits: jax.Array, p: jax.Array) -> jax.Array:
    """The logits [B, V] of tokens at least `p` times as probable as the most probable one."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= least, logits, -jnp.inf)
