"""Parts that several methods share: weighted sums and the election of signs.

Axes: k expert, and the tensor's own axes (...).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

Vectors = Mapping[str, jax.Array]


def weighted_sum(vectors: Vectors, weight: Vectors, normalize: bool) -> jax.Array:
    """sum_k w_k v_k, with ``normalize`` over sum_k w_k (over 1 where that is zero)."""
    total = sum(weight[name] * vector for name, vector in vectors.items())
    if normalize:
        total = total / _divisor(sum(weight[name] for name in vectors))
    return jnp.asarray(total)


def elected_sum(
    vectors: Vectors, weight: Vectors, normalize: bool, elect: str = "weighted"
) -> jax.Array:
    """Per element, the weighted sum over those experts whose sign is the elected one.

    The elected sign is that of the sum over the experts, of w_k v_k (``elect="weighted"``) or of
    v_k (``"plain"``); a sum of zero elects plus. With ``normalize`` the result is divided, per
    element, by the sum of the weights that took part.
    """
    if elect not in ("weighted", "plain"):
        raise ValueError(f"elect must be 'weighted' or 'plain', not {elect!r}")
    # A negative weight turns an expert's sign, in the vote by weight and in the sum alike.
    terms = {name: weight[name] * vector for name, vector in vectors.items()}
    ballots = terms if elect == "weighted" else vectors
    elected = jnp.where(sum(ballots.values()) >= 0, 1.0, -1.0)  # [...]
    agrees = {name: jnp.sign(ballots[name]) == elected for name in vectors}
    total = sum(jnp.where(agrees[name], terms[name], 0.0) for name in vectors)
    if normalize:
        taking_part = sum(jnp.where(agrees[name], weight[name], 0.0) for name in vectors)
        total = total / jnp.where(taking_part == 0, 1.0, taking_part)
    return jnp.asarray(total)


def _divisor(total: jax.Array | int) -> jax.Array:
    return jnp.where(jnp.abs(total) < 1e-8, 1.0, total)
