"""Entropic advantages of a group of samples (TTT-Discover, arXiv 2601.16175)."""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float

TARGET_KL = math.log(2)
_MAX_BETA = 1e6  # reached if too many samples share the best reward; as in the authors' code
_BISECTIONS = 60


def entropic_advantages(rewards: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Return the advantage of each sample, w - 1, under the entropic objective.

    The objective is log E[exp(beta R)], which tends to the expected reward for small beta and to
    the maximum for large ones. Its gradient weights a sample by w = exp(beta r) / E[exp(beta R)]
    (section 3.2 and appendix A of Yuksekgonul et al. 2026, arXiv 2601.16175). As in the authors'
    code, the expectation is the mean over the other samples of the group, and beta is
    `entropic_beta` of the group. Equal rewards give zero advantages. In a group of two, whose beta
    has no bound, the mean is over both, so that the advantages are 1 and -1.

    Args:
        rewards: finite rewards of the samples of one group.
    """
    if len(rewards) < 2 or np.ptp(rewards) == 0:
        return np.zeros(len(rewards))
    powers = np.exp(entropic_beta(rewards) * _below_best(rewards))
    if len(powers) == 2:
        return powers / powers.mean() - 1
    return powers * (len(powers) - 1) / (powers.sum() - powers) - 1


def entropic_beta(rewards: Float[np.ndarray, " samples"]) -> float:
    """Return the beta whose weights have KL(q || uniform) = ln 2, q proportional to exp(beta r).

    By bisection. If even the largest beta does not reach ln 2, since half of the samples or more
    share the best reward, it is returned; 0 if all rewards are equal.

    Args:
        rewards: finite rewards of at least two samples.
    """
    gaps = _below_best(rewards)
    if not gaps.any():
        return 0.0
    low, high = 0.0, 1.0
    while high < _MAX_BETA and _kl_to_uniform(high * gaps) < TARGET_KL:
        high *= 2
    if _kl_to_uniform(high * gaps) < TARGET_KL:
        return high
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if _kl_to_uniform(middle * gaps) < TARGET_KL:
            low = middle
        else:
            high = middle
    return high


def _below_best(rewards: Float[np.ndarray, " samples"]) -> Float[np.ndarray, " samples"]:
    """Return the rewards minus the best one, so that powers cannot overflow."""
    rewards = np.asarray(rewards, np.float64)
    return rewards - rewards.max()


def _kl_to_uniform(logits: Float[np.ndarray, " samples"]) -> float:
    logprobs = logits - np.log(np.exp(logits).sum())
    return float((np.exp(logprobs) * (logprobs + math.log(len(logits)))).sum())
