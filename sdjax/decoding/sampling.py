"""Sampling of the next token from logits, as composable pure functions.

Each `mask_*` function sets the logits of excluded tokens to minus infinity. Applied in the order of
`Sampling` (temperature, top-k, top-p, min-p), they equal transformers' logits warpers, except that
tokens tied at the top-p threshold are all kept.

Axes: see `sdjax.models.types`.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Key

from sdjax.core.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sampling:
    """Sampling parameters; temperature 0 is greedy decoding.

    Attributes:
        temperature: divides the logits.
        top_k: number of most probable tokens to keep; None keeps all.
        top_p: keeps the smallest set of tokens with at least this total probability (nucleus
            sampling, Holtzman et al. 2020, arXiv 1904.09751); 1 keeps all.
        min_p: keeps the tokens at least this many times as probable as the most probable one
            (Nguyen et al. 2024, arXiv 2407.01082); 0 keeps all.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise UserError(f"temperature must be 0 or more, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be 1 or more, not {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if not 0 <= self.min_p <= 1:
            raise UserError(f"min_p must be between 0 and 1, not {self.min_p}")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is always chosen."""
        return self.temperature == 0.0

    def scalar_params(self) -> dict[str, jax.Array]:
        """Return the arguments of `sample_tokens` that are in use, as arrays.

        Arrays are traced, so that other values of the same parameters need no compilation.
        """
        if self.greedy:
            return {}
        params = {"temperature": self.temperature}
        if self.top_p < 1:
            params["top_p"] = self.top_p
        if self.min_p > 0:
            params["min_p"] = self.min_p
        return {name: jnp.float32(value) for name, value in params.items()}


def sample_tokens(
    logits: Float[Array, "batch vocab"],
    keys: Key[Array, " batch"],
    *,
    temperature: Float[Array, ""],
    top_k: int | None = None,
    top_p: Float[Array, ""] | None = None,
    min_p: Float[Array, ""] | None = None,
) -> Int[Array, " batch"]:
    """Sample one token per row.

    Args:
        logits: unnormalized log-probabilities.
        keys: one PRNG key per row.
        temperature: see `warp_logits`, like the other three.
        top_k: None keeps all tokens.
        top_p: None keeps all tokens.
        min_p: None keeps all tokens.
    """
    masked = warp_logits(logits, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    return jax.vmap(jax.random.categorical)(keys, masked).astype(jnp.int32)


def warp_logits(
    logits: Float[Array, "batch vocab"],
    *,
    temperature: Float[Array, ""],
    top_k: int | None = None,
    top_p: Float[Array, ""] | None = None,
    min_p: Float[Array, ""] | None = None,
) -> Float[Array, "batch vocab"]:
    """Return the logits of the distribution that tokens are sampled from.

    Args:
        logits: unnormalized log-probabilities.
        temperature: divides the logits.
        top_k: see `Sampling`, like the other two.
        top_p: None keeps all tokens.
        min_p: None keeps all tokens.
    """
    masked = logits / temperature
    if top_k is not None:
        masked = mask_top_k(masked, top_k)
    if top_p is not None:
        masked = mask_top_p(masked, top_p)
    if min_p is not None:
        masked = mask_min_p(masked, min_p)
    return masked


def mask_top_k(logits: Float[Array, "batch vocab"], k: int) -> Float[Array, "batch vocab"]:
    """Mask all but the `k` highest logits and those equal to the lowest of them."""
    threshold = jax.lax.top_k(logits, min(k, logits.shape[-1]))[0][..., -1:]
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def mask_top_p(
    logits: Float[Array, "batch vocab"], p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Mask all but the smallest set of highest logits with total probability `p`."""
    descending = jnp.sort(logits, axis=-1, descending=True)
    probs = jax.nn.softmax(descending, axis=-1)
    # A token is kept if the mass before it is below p, so the most probable one is always kept.
    mass_before = jnp.cumsum(probs, axis=-1) - probs
    threshold = jnp.min(jnp.where(mass_before < p, descending, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def mask_min_p(
    logits: Float[Array, "batch vocab"], p: Float[Array, ""]
) -> Float[Array, "batch vocab"]:
    """Mask the tokens less than `p` times as probable as the most probable one."""
    threshold = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(p)
    return jnp.where(logits >= threshold, logits, -jnp.inf)
