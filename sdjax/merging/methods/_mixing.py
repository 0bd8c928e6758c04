"""Parts that several methods share: weighted sums, the election of signs, and rescaling.

Axes: k expert, and the tensor's own axes (...).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sdjax.merging.reductions import sums

Vectors = Mapping[str, jax.Array]

RESCALE = ("density", "l1", "none")
ELECT = ("weighted", "plain")
# What a recipe may say, and which word it means.
RESCALE_CHOICES: dict[Any, str] = {
    True: "l1",
    False: "none",
    **dict(zip(RESCALE, RESCALE, strict=True)),
}
ELECT_CHOICES = dict(zip(ELECT, ELECT, strict=True))


def weighted_sum(vectors: Vectors, weight: Vectors, normalize: bool) -> jax.Array:
    """sum_k w_k v_k, with ``normalize`` over sum_k w_k (over 1 where that is zero)."""
    total = sum(weight[name] * vector for name, vector in vectors.items())
    if normalize:
        divisor = jnp.asarray(sum(weight[name] for name in vectors))
        total = total / jnp.where(jnp.abs(divisor) < 1e-8, 1.0, divisor)
    return jnp.asarray(total)


def sign_agreement(ballots: Vectors) -> dict[str, jax.Array]:
    """Per expert and element, whether its sign is that of the sum (a sum of zero elects plus)."""
    elected = jnp.where(sum(ballots.values()) >= 0, 1.0, -1.0)  # [...]
    return {name: jnp.sign(ballot) == elected for name, ballot in ballots.items()}


def elected_sum(
    vectors: Vectors, weight: Vectors, normalize: bool, elect: str = "weighted"
) -> jax.Array:
    """Per element, the weighted sum over those experts whose sign is the elected one.

    The elected sign is that of the sum over the experts, of w_k v_k (``elect="weighted"``) or of
    v_k (``"plain"``). With ``normalize`` the result is divided, per element, by the sum of the
    weights that took part.
    """
    if elect not in ELECT:
        raise ValueError(f"elect must be one of {', '.join(ELECT)}, not {elect!r}")
    # A negative weight turns an expert's sign, in the vote by weight and in the sum alike.
    terms = {name: weight[name] * vector for name, vector in vectors.items()}
    agrees = sign_agreement(terms if elect == "weighted" else vectors)
    total = sum(jnp.where(agrees[name], terms[name], 0.0) for name in vectors)
    if normalize:
        taking_part = sum(jnp.where(agrees[name], weight[name], 0.0) for name in vectors)
        total = total / jnp.where(taking_part == 0, 1.0, taking_part)
    return jnp.asarray(total)


def keep_and_rescale(
    vectors: Vectors, masks: Vectors, share: Vectors, rescale: str
) -> dict[str, jax.Array]:
    """The elements of each vector where its mask is true, rescaled; zero elsewhere.

    share: the probability or share with which an element is kept, a scalar or one each. rescale:
    "density" divides by it (so that the expectation is kept), "l1" restores the sum of magnitudes
    (mergekit's way), "none" does nothing.
    """
    if rescale not in RESCALE:
        raise ValueError(f"rescale must be one of {', '.join(RESCALE)}, not {rescale!r}")
    kept = {name: jnp.where(masks[name], vector, 0.0) for name, vector in vectors.items()}
    if rescale == "density":
        return {n: k / jnp.where(share[n] > 0, share[n], 1.0) for n, k in kept.items()}
    if rescale == "l1":
        return {n: k * _l1_ratio(vectors[n], masks[n]) for n, k in kept.items()}
    return kept


def _l1_ratio(vector: jax.Array, mask: jax.Array) -> jax.Array:
    size = jnp.abs(vector)
    before, after = sums([size, jnp.where(mask, size, 0.0)])
    return jnp.where((before < 1e-7) | (after < 1e-7), 1.0, before / after)
