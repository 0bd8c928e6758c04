"""Entropic advantages: against a reference in NumPy, and their properties."""

import math

import numpy as np
import pytest

from sdjax.training.advantages import entropic_advantages, entropic_beta


def kl_to_uniform(beta, rewards):
    q = np.exp(beta * rewards) / np.exp(beta * rewards).sum()
    return float((q * np.log(q * len(q))).sum())


@pytest.mark.parametrize("case", range(20))
def test_advantages_equal_the_definition(case):
    rng = np.random.default_rng(case)
    rewards = rng.uniform(0, 1, rng.integers(3, 40))
    beta = entropic_beta(rewards)
    assert kl_to_uniform(beta, rewards) == pytest.approx(math.log(2), abs=1e-9)
    powers = np.exp(beta * rewards)
    others = [np.delete(powers, index).mean() for index in range(len(rewards))]
    found = entropic_advantages(rewards)
    np.testing.assert_allclose(found, powers / others - 1, rtol=1e-7, atol=1e-9)
    # better samples have larger advantages, whatever the order, the origin and the unit of rewards
    order = rng.permutation(len(rewards))
    assert (np.diff(found[np.argsort(rewards)]) >= 0).all()
    np.testing.assert_allclose(entropic_advantages(rewards[order]), found[order], rtol=1e-7)
    np.testing.assert_allclose(entropic_advantages(3 + 20 * rewards), found, rtol=1e-6)


def test_equal_rewards_and_single_samples_have_no_advantage():
    assert not entropic_advantages(np.full(7, 0.3)).any()
    assert not entropic_advantages(np.array([0.3])).any()
    assert len(entropic_advantages(np.array([]))) == 0


def test_two_samples_have_bounded_advantages():
    np.testing.assert_allclose(entropic_advantages(np.array([0.2, 0.4])), [-1, 1], atol=1e-6)


def test_shared_best_reward_gives_finite_advantages():
    """Check a group in which no beta reaches ln 2: at most, three of four share the weight."""
    found = entropic_advantages(np.array([1.0, 1.0, 0.0, 1.0]))
    assert np.isfinite(found).all()
    assert found[2] == pytest.approx(-1)
    assert (found[[0, 1, 3]] > 0).all()
