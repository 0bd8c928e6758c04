"""Preference losses; to add one, write a function and list it in `LOSSES`.

Axes: see `sdjax.training.types`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

# (log_ratios, lengths, beta, label_smoothing) -> loss of each pair. A log ratio is the
# log-probability of a completion under the policy minus that under the reference; a length is its
# number of tokens. The last axis is (chosen, rejected).
PreferenceLoss: TypeAlias = Callable[[jax.Array, jax.Array, float, float], jax.Array]

# Largest exponent of `forward_kl_loss`. A completion may become e^100 times less probable, whose
# power overflows float32, and so does the square of its gradient in the global norm from e^44 on.
# e^30 leaves room for the gradient of the log-probability. Below it, a chosen completion that has
# become less probable is pulled back as strongly as the loss says; beyond it, not at all.
MAX_EXPONENT = 30.0


def sigmoid_loss(
    log_ratios: Float[Array, "pairs 2"],
    lengths: Float[Array, "pairs 2"],
    beta: float,
    label_smoothing: float,
) -> Float[Array, " pairs"]:
    """Return the DPO loss, -log sigmoid(beta margin).

    Equation 7 of Rafailov et al. 2023, arXiv 2305.18290.

    Args:
        log_ratios: log ratios of the (chosen, rejected) completions.
        lengths: number of tokens in each completion; unused.
        beta: strength of the pull toward the reference.
        label_smoothing: unused.
    """
    return -jax.nn.log_sigmoid(beta * (log_ratios[:, 0] - log_ratios[:, 1]))


def ipo_loss(
    log_ratios: Float[Array, "pairs 2"],
    lengths: Float[Array, "pairs 2"],
    beta: float,
    label_smoothing: float,
) -> Float[Array, " pairs"]:
    """Return the IPO loss, (margin - 1 / (2 beta))^2.

    Equation 17 of Azar et al. 2023, arXiv 2310.12036. As in TRL, the margin is the difference of
    log ratios per token; the authors confirmed that they also normalized by length.

    Args:
        log_ratios: log ratios of the (chosen, rejected) completions.
        lengths: number of tokens in each completion.
        beta: strength of the pull toward the reference.
        label_smoothing: unused.
    """
    per_token = log_ratios / jnp.maximum(lengths, 1)
    return jnp.square(per_token[:, 0] - per_token[:, 1] - 1 / (2 * beta))


def robust_loss(
    log_ratios: Float[Array, "pairs 2"],
    lengths: Float[Array, "pairs 2"],
    beta: float,
    label_smoothing: float,
) -> Float[Array, " pairs"]:
    """Return the robust DPO loss, ((1 - e) L(margin) - e L(-margin)) / (1 - 2 e).

    L is the DPO loss and e the probability that the sides of a pair are swapped. The loss is an
    unbiased estimate of that of correct pairs (Chowdhury et al. 2024, arXiv 2403.00409).

    Args:
        log_ratios: log ratios of the (chosen, rejected) completions.
        lengths: number of tokens in each completion; unused.
        beta: strength of the pull toward the reference.
        label_smoothing: e, below 0.5.
    """
    margin = beta * (log_ratios[:, 0] - log_ratios[:, 1])
    correct, swapped = -jax.nn.log_sigmoid(margin), -jax.nn.log_sigmoid(-margin)
    total = (1 - label_smoothing) * correct - label_smoothing * swapped
    return total / (1 - 2 * label_smoothing)


def forward_kl_loss(
    log_ratios: Float[Array, "pairs 2"],
    lengths: Float[Array, "pairs 2"],
    beta: float,
    label_smoothing: float,
) -> Float[Array, " pairs"]:
    """Return the DPO loss with the forward KL divergence, -log sigmoid(beta (e^-l - e^-c)).

    c and l are the log ratios of the chosen and the rejected completion. A completion that the
    reference can write must not become improbable, so the policy stays broad. Wang et al. 2023,
    arXiv 2309.16240, as EvoTune uses it (Surina et al. 2025, arXiv 2504.05108). The exponents are
    clamped at `MAX_EXPONENT`.

    Args:
        log_ratios: log ratios of the (chosen, rejected) completions.
        lengths: number of tokens in each completion; unused.
        beta: strength of the pull toward the reference.
        label_smoothing: unused.
    """
    powers = jnp.exp(jnp.minimum(-log_ratios, MAX_EXPONENT))
    return -jax.nn.log_sigmoid(beta * (powers[:, 1] - powers[:, 0]))


LOSSES: dict[str, PreferenceLoss] = {
    "sigmoid": sigmoid_loss,
    "ipo": ipo_loss,
    "robust": robust_loss,
    "forward_kl": forward_kl_loss,
}
SMOOTHED_LOSSES = ("robust",)  # those that use `label_smoothing`
