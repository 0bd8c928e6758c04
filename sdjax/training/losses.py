"""Losses of preference training, each a small function; another one is one more in `LOSSES`.

Axes: B pairs; the axis of 2 is (winner, loser).
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# (gains [B, 2], lengths [B, 2], beta) -> losses [B]. A gain is the policy's log-probability of a
# completion minus the reference's, a length its number of tokens.
PreferenceLoss = Callable[[jax.Array, jax.Array, float], jax.Array]


def sigmoid_loss(gains: jax.Array, lengths: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(beta margin): DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""
    return -jax.nn.log_sigmoid(beta * (gains[:, 0] - gains[:, 1]))


def ipo_loss(gains: jax.Array, lengths: jax.Array, beta: float) -> jax.Array:
    """(margin - 1 / (2 beta))^2: IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    The margin is of gains a token, as TRL's: the paper's authors confirmed to it that this is how
    their results were made.
    """
    mean_gains = gains / jnp.maximum(lengths, 1)
    return jnp.square(mean_gains[:, 0] - mean_gains[:, 1] - 1 / (2 * beta))


LOSSES: dict[str, PreferenceLoss] = {"sigmoid": sigmoid_loss, "ipo": ipo_loss}
