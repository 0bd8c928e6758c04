"""Preference losses; to add one, write a function and list it in `LOSSES`.

Axes: see `sdjax.training.types`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (log_ratios, lengths, beta) -> loss of each pair. A log ratio is the log-probability of a
# completion under the policy minus that under the reference; a length is its number of tokens. The
# last axis is (chosen, rejected).
PreferenceLoss: TypeAlias = Callable[[jax.Array, jax.Array, float], jax.Array]


def sigmoid_loss(
    log_ratios: Float[Array, "pairs 2"], lengths: Float[Array, "pairs 2"], beta: float
) -> Float[Array, " pairs"]:
    """Return the DPO loss, -log sigmoid(beta margin).

    Equation 7 of Rafailov et al. 2023, arXiv 2305.18290.

    Args:
        log_ratios: log ratios of the (chosen, rejected) completions.
        lengths: number of tokens in each completion; unused.
        beta: strength of the pull toward the reference.
    """
    return -jax.nn.log_sigmoid(beta * (log_ratios[:, 0] - log_ratios[:, 1]))


def ipo_loss(
    log_ratios: Float[Array, "pairs 2"], lengths: Float[Array, "pairs 2"], beta: float
) -> Float[Array, " pairs"]:
    """Return the IPO loss, (margin - 1 / (2 beta))^2.

    Equation 17 of Azar et al. 2023, arXiv 2310.12036. As in TRL, the margin is the difference of
    log ratios per token; the authors confirmed that they also normalized by length.

    Args:
        log_ratios: log ratios of the (chosen, rejected) completions.
        lengths: number of tokens in each completion.
        beta: strength of the pull toward the reference.
    """
    per_token = log_ratios / jnp.maximum(lengths, 1)
    return jnp.square(per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta))


LOSSES: dict[str, PreferenceLoss] = {"sigmoid": sigmoid_loss, "ipo": ipo_loss}
