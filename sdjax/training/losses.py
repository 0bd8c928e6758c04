"""Losses of preference training, each a function of the margin.

The margin of a pair is (winner minus loser) of (policy minus reference) log-probability. A loss
maps margins [B] and beta to losses [B]; another one is one more function in `LOSSES`.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

PreferenceLoss = Callable[[jax.Array, float], jax.Array]


def sigmoid_loss(margin: jax.Array, beta: float) -> jax.Array:
    """-log sigmoid(beta margin): DPO (Rafailov et al. 2023, arXiv 2305.18290, eq. 7)."""
    return -jax.nn.log_sigmoid(beta * margin)


def ipo_loss(margin: jax.Array, beta: float) -> jax.Array:
    """(margin - 1 / (2 beta))^2: IPO (Azar et al. 2023, arXiv 2310.12036, eq. 17)."""
    return jnp.square(margin - 1 / (2 * beta))


LOSSES: dict[str, PreferenceLoss] = {"sigmoid": sigmoid_loss, "ipo": ipo_loss}
