"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) of a LoRA adapter.

Axes: P pairs, B pairs of a batch, L tokens; the second axis of 2 is (winner, loser).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.errors import UserError
from sdjax.models.adapter import Adapter
from sdjax.models.config import ModelConfig
from sdjax.sharding.rules import replicated
from sdjax.training.fit import Loss, OptimiserSettings, fit
from sdjax.training.logprobs import token_logprobs
from sdjax.training.packing import Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPair:
    """Two completions, each behind its own prompt, end token included."""

    winner: Example
    loser: Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOSettings:
    """How a round of DPO trains.

    Attributes:
        beta: how strongly the policy is held to the reference.
        nll_weight: weight of the winner's mean negative log-likelihood (RPO, Pang et al. 2024,
            arXiv 2404.19733); without it small generators forget how to write programs.
        batch: pairs a step.
        steps: updates; the pairs are drawn in a new order each time they are used up.
        reference: `policy` is the adapter at the start of the round, `seed` is no adapter.
    """

    beta: float = 0.01
    learning_rate: float = 1e-6
    nll_weight: float = 0.0
    batch: int = 8
    steps: int = 100
    warmup: int = 0
    reference: str = "policy"


def train_dpo(
    config: ModelConfig,
    params: dict,
    adapter: Adapter,
    pairs: Sequence[TokenPair],
    settings: DPOSettings,
    *,
    key: jax.Array,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Adapter, list[dict[str, float]]]:
    """One round of DPO on the adapter; the weights stay as they are.

    The reference's log-probabilities are computed once, before the first update, so the loss of
    the first step is log 2 (and `nll_weight` times the likelihood term).

    Raises:
        UserError: no pairs, a pair that does not fit the context, or a loss that is not finite.
    """
    if not pairs:
        raise UserError("DPO: there are no preference pairs to train on")
    data = pad_pairs(pairs, config.context)
    reference = adapter if settings.reference == "policy" else None
    logprobs = jax.jit(
        lambda *given: sequence_logprobs(config, *given), out_shardings=replicated(params)
    )
    data["reference"] = np.concatenate(
        [
            np.asarray(logprobs(params, reference, _rows(data, rows)))
            for rows in _batches(len(pairs), settings.batch)
        ]
    )[: len(pairs)]
    optimiser = OptimiserSettings(
        learning_rate=settings.learning_rate, steps=settings.steps, warmup=settings.warmup
    )
    orders = _shuffled(len(pairs), settings, key)
    factors, history = fit(
        dpo_loss(config, settings, adapter.scale),
        adapter.factors,
        params,
        (_rows(data, rows) for rows in orders),
        optimiser,
        on_step=on_step,
    )
    return dataclasses.replace(adapter, factors=factors), history


def dpo_loss(config: ModelConfig, settings: DPOSettings, scale: float) -> Loss:
    """-log sigmoid(beta * margin), the margin being winner minus loser, policy minus reference."""

    def loss(
        factors: dict, params: dict, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        adapter = Adapter(factors=factors, scale=scale)
        policy = sequence_logprobs(config, params, adapter, batch)  # [B, 2]
        gain = policy - batch["reference"]
        margin = gain[:, 0] - gain[:, 1]
        likelihood = -(policy[:, 0] / batch["weights"][:, 0].sum(-1)).mean()
        value = -jax.nn.log_sigmoid(settings.beta * margin).mean()
        metrics = {
            "dpo_loss": value,
            "margin": settings.beta * margin.mean(),
            "accuracy": (margin > 0).mean(),
            "winner_nll": likelihood,
        }
        return value + settings.nll_weight * likelihood, metrics

    return loss


def sequence_logprobs(
    config: ModelConfig, params: dict, adapter: Adapter | None, batch: dict[str, jax.Array]
) -> jax.Array:
    """The log-probability of each completion given its prompt: [B, 2] float32."""
    batch_size, _, length = batch["tokens"].shape
    tokens = batch["tokens"].reshape(batch_size * 2, length)
    positions = jnp.broadcast_to(jnp.arange(length), tokens.shape)
    logprobs = token_logprobs(params, adapter, tokens, config=config, positions=positions)
    return (logprobs.reshape(batch_size, 2, length - 1) * batch["weights"]).sum(-1)


def pad_pairs(pairs: Sequence[TokenPair], context: int) -> dict[str, np.ndarray]:
    """`tokens` [P, 2, L] int32 and `weights` [P, 2, L - 1] float32, 1 on the completions.

    L is a multiple of 64, so that rounds with similar programs share a compiled step.

    Raises:
        UserError: a pair is longer than the context.
    """
    longest = max(len(side) for pair in pairs for side in (pair.winner, pair.loser))
    if longest > context:
        raise UserError(f"DPO: a pair has {longest} tokens, the model's context is {context}")
    length = min(-(-longest // 64) * 64, context)
    tokens = np.zeros((len(pairs), 2, length), np.int32)
    weights = np.zeros((len(pairs), 2, length - 1), np.float32)
    for index, pair in enumerate(pairs):
        for side, text in enumerate((pair.winner, pair.loser)):
            tokens[index, side, : len(text)] = text.prompt + text.target
            weights[index, side, len(text.prompt) - 1 : len(text) - 1] = 1.0
    return {"tokens": tokens, "weights": weights}


def _batches(count: int, size: int) -> Iterator[np.ndarray]:
    for start in range(0, count, size):
        # The last batch is filled up by wrapping around, to keep one shape.
        yield np.arange(start, start + size) % count


def _shuffled(count: int, settings: DPOSettings, key: jax.Array) -> Iterator[np.ndarray]:
    """Index batches [B] for all steps: permutation after permutation, by key."""
    order = np.zeros(0, np.int64)
    for step in range(settings.steps):
        while len(order) < settings.batch:
            fresh = jax.random.permutation(jax.random.fold_in(key, step * 1000 + len(order)), count)
            order = np.concatenate([order, np.asarray(fresh)])
        yield order[: settings.batch]
        order = order[settings.batch :]


def _rows(data: dict[str, np.ndarray], rows: np.ndarray) -> dict[str, np.ndarray]:
    return {name: array[rows] for name, array in data.items()}
