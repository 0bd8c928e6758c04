"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290).

Axes: P pairs, B pairs of a batch, L tokens, G parts of a batch, K trained tokens of each; the axis
of 2 is (winner, loser).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange

from sdjax.core.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.sharding.rules import replicated
from sdjax.training.fit import Loss, OptimiserSettings, fit, parts_of
from sdjax.training.logprobs import token_logprobs
from sdjax.training.losses import LOSSES
from sdjax.training.packing import Example, batches_of
from sdjax.training.trainable import Assemble, Trainable


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPair:
    """Two completions, each behind its own prompt, end token included."""

    winner: Example
    loser: Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOSettings:
    """How a round of DPO trains.

    Attributes:
        loss: a name in `sdjax.training.losses.LOSSES`.
        beta: how strongly the policy is held to the reference.
        nll_weight: weight of the winner's mean negative log-likelihood (RPO, Pang et al. 2024,
            arXiv 2404.19733); without it small generators forget how to write programs.
        batch: pairs a step.
        steps: updates; the pairs are drawn in a new order each time they are used up.
        reference: `policy` is the policy at the start of the round, `seed` is no adapter.
    """

    loss: str = "sigmoid"
    beta: float = 0.01
    learning_rate: float = 1e-6
    nll_weight: float = 0.0
    batch: int = 8
    steps: int = 100
    warmup: int = 0
    reference: str = "policy"

    def optimiser(self) -> OptimiserSettings:
        return OptimiserSettings(
            learning_rate=self.learning_rate, steps=self.steps, warmup=self.warmup
        )


def train_dpo(
    trainee: Trainable,
    pairs: Sequence[TokenPair],
    settings: DPOSettings,
    *,
    key: jax.Array,
    on_step: Callable[[int, dict[str, float]], None] | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """One round of DPO; the trained pytree, and the metrics of each step.

    The reference's log-probabilities are computed once, before the first update, so the loss of
    the first step is log 2 (and `nll_weight` times the likelihood term).

    Raises:
        UserError: no pairs, a pair that does not fit the context, or a loss that is not finite.
    """
    data = pad_pairs(pairs, trainee.config.max_seq_len)
    data["reference"] = reference_logprobs(trainee, data, settings)
    return fit(
        dpo_loss(trainee.config, trainee.assemble, settings),
        trainee.trainable,
        trainee.frozen,
        pair_batches(trainee, data, settings, key=key),
        settings.optimiser(),
        on_step=on_step,
    )


def pair_batches(
    trainee: Trainable, data: dict[str, np.ndarray], settings: DPOSettings, *, key: jax.Array
) -> Iterator[dict[str, np.ndarray]]:
    """The batches of `settings.steps` steps.

    Args:
        data: as of `pad_pairs`, with `reference` [P, 2] float32 as of `reference_logprobs`.
    """
    chosen = list(_shuffled(len(data["tokens"]), settings, key))
    return batches_of(data, chosen, parts=parts_of(trainee.trainable, settings.batch))


def reference_logprobs(
    trainee: Trainable,
    data: dict[str, np.ndarray],
    settings: DPOSettings,
    *,
    on_pairs: Callable[[int], None] | None = None,
) -> np.ndarray:
    """The reference's log-probability of each completion: [P, 2] float32.

    To be computed before any update. on_pairs: gets how many more are done.
    """

    def logprobs(trainable: Any, frozen: Any, batch: dict) -> jax.Array:
        params, adapter = trainee.assemble(trainable, frozen)
        if settings.reference == "seed":
            adapter = None
        return sequence_logprobs(trainee.config, params, adapter, batch)

    compiled = jax.jit(logprobs, out_shardings=replicated((trainee.trainable, trainee.frozen)))
    count, size = len(data["tokens"]), settings.batch
    # The last batch is filled up by wrapping around, to keep one shape.
    chosen = [np.arange(start, start + size) % count for start in range(0, count, size)]
    found = []
    for batch in batches_of(data, chosen, parts=parts_of(trainee.trainable, size)):
        found.append(np.asarray(compiled(trainee.trainable, trainee.frozen, batch)))
        if on_pairs is not None:
            on_pairs(min(size, count - size * (len(found) - 1)))
    return np.concatenate(found)[:count]


def dpo_loss(config: ModelConfig, assemble: Assemble, settings: DPOSettings) -> Loss:
    """The preference loss of a batch of pairs, and the winner's likelihood beside it."""
    preference = LOSSES[settings.loss]

    def loss(
        trainable: Any, frozen: Any, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        policy = sequence_logprobs(config, *assemble(trainable, frozen), batch)  # [B, 2]
        gains = policy - batch["reference"]
        lengths = _by_completion(batch["weights"], batch)
        margin = gains[:, 0] - gains[:, 1]
        likelihood = -(policy[:, 0] / lengths[:, 0]).mean()
        value = preference(gains, lengths, settings.beta).mean()
        metrics = {
            "dpo_loss": value,
            "margin": settings.beta * margin.mean(),
            "accuracy": (margin > 0).mean(),
            "winner_nll": likelihood,
            "tokens": lengths.sum(),
        }
        return value + settings.nll_weight * likelihood, metrics

    return loss


def sequence_logprobs(
    config: ModelConfig, params: dict, adapter: Adapter | None, batch: dict[str, jax.Array]
) -> jax.Array:
    """The log-probability of each completion given its prompt: [B, 2] float32."""
    tokens = rearrange(batch["tokens"], "b s t -> (b s) t")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logprobs = token_logprobs(
        params, adapter, tokens, config=config, positions=positions, at=batch["at"]
    )
    return _by_completion(logprobs * batch["weights"], batch)


def _by_completion(values: jax.Array, batch: dict[str, jax.Array]) -> jax.Array:
    """The sums of [G, K] over each completion's trained tokens: [B, 2]."""
    pairs, _, length = batch["tokens"].shape
    sides = jnp.arange(2 * pairs // len(values))
    # As a masked sum, whose gradient is no scatter.
    own = batch["at"][..., None] // length == sides
    return jnp.where(own, values[..., None], 0).sum(1).reshape(pairs, 2)


def pad_pairs(pairs: Sequence[TokenPair], context: int) -> dict[str, np.ndarray]:
    """`tokens` [P, 2, L] int32 and `weights` [P, 2, L] float32, 1 on the completions.

    L is a multiple of 64, so that rounds with similar programs share a compiled step.

    Raises:
        UserError: no pairs, or a pair that is longer than the context.
    """
    if not pairs:
        raise UserError("DPO: there are no preference pairs to train on")
    longest = max(len(side) for pair in pairs for side in (pair.winner, pair.loser))
    if longest > context:
        raise UserError(f"DPO: a pair has {longest} tokens, the model's context is {context}")
    length = min(-(-longest // 64) * 64, context)
    tokens = np.zeros((len(pairs), 2, length), np.int32)
    weights = np.zeros((len(pairs), 2, length), np.float32)
    for index, pair in enumerate(pairs):
        for side, text in enumerate((pair.winner, pair.loser)):
            tokens[index, side, : len(text)] = text.prompt + text.target
            weights[index, side, len(text.prompt) : len(text)] = 1.0
    return {"tokens": tokens, "weights": weights}


def _shuffled(count: int, settings: DPOSettings, key: jax.Array) -> Iterator[np.ndarray]:
    """Index batches [B] for all steps: permutation after permutation, by key."""
    order = np.zeros(0, np.int64)
    for step in range(settings.steps):
        while len(order) < settings.batch:
            fresh = jax.random.permutation(jax.random.fold_in(key, step * 1000 + len(order)), count)
            order = np.concatenate([order, np.asarray(fresh)])
        yield order[: settings.batch]
        order = order[settings.batch :]
