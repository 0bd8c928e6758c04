"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290).

Axes: see `sdjax.training.types`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.models.config import ModelConfig
from sdjax.models.lora import Adapter
from sdjax.models.types import Params
from sdjax.sharding.rules import replicated
from sdjax.training.config import DPOConfig
from sdjax.training.fit import num_parts
from sdjax.training.logprobs import token_logprobs
from sdjax.training.losses import LOSSES
from sdjax.training.packing import Example, target_batches
from sdjax.training.trainable import Assemble, Trainable
from sdjax.training.types import Batch, LossFn, Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPair:
    """A preference pair: two completions with their prompts, ending with end-of-sequence."""

    chosen: Example
    rejected: Example


def dpo_loss(config: ModelConfig, assemble: Assemble, dpo: DPOConfig) -> LossFn:
    """Return a loss function for batches of pairs: the preference loss plus `nll_weight` times NLL.

    Metrics have TRL's names; `dpo_loss` is the preference loss alone, and `nll_loss` is the mean
    negative log-likelihood per token of the chosen completions.

    Args:
        config: architecture of the model.
        assemble: combines trainable and frozen arrays into a model.
        dpo: loss, beta and `nll_weight`.
    """
    preference_loss = LOSSES[dpo.loss]

    def loss(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        policy = sequence_logprobs(config, *assemble(trainable, frozen), batch)
        log_ratios = policy - batch["reference"]
        lengths = _sum_by_completion(jnp.asarray(batch["weights"]), batch)
        rewards = dpo.beta * log_ratios
        reward_margin = rewards[:, 0] - rewards[:, 1]
        nll = -(policy[:, 0] / lengths[:, 0]).mean()
        value = preference_loss(log_ratios, lengths, dpo.beta).mean()
        metrics = {
            "dpo_loss": value,
            "nll_loss": nll,
            "rewards/chosen": rewards[:, 0].mean(),
            "rewards/rejected": rewards[:, 1].mean(),
            "rewards/accuracies": (reward_margin > 0).mean(),
            "rewards/margins": reward_margin.mean(),
            "logps/chosen": policy[:, 0].mean(),
            "logps/rejected": policy[:, 1].mean(),
            "tokens": lengths.sum(),
        }
        return value + dpo.nll_weight * nll, metrics

    return loss


def reference_logprobs(
    trainable: Trainable,
    data: dict[str, np.ndarray],
    dpo: DPOConfig,
    *,
    title: str = "reference",
) -> np.ndarray:
    """Return the log-probability of each completion under the reference: [pairs, 2] float32.

    Must be called before the first update.

    Args:
        trainable: the policy.
        data: pairs, in the form returned by `pad_pairs`.
        dpo: config; `reference` selects the model, `batch_size` sets the pairs per batch.
        title: text in front of the progress bar.
    """

    def logprobs(trained: Any, frozen: Any, batch: Batch) -> jax.Array:
        params, adapter = trainable.assemble(trained, frozen)
        if dpo.reference == "seed":
            adapter = None
        return sequence_logprobs(trainable.config, params, adapter, batch)

    arrays = (trainable.trainable, trainable.frozen)
    compiled = jax.jit(logprobs, out_shardings=replicated(arrays))
    count, size = len(data["tokens"]), dpo.batch_size
    # The last batch wraps around, so that all batches have the same shape.
    indices = [np.arange(start, start + size) % count for start in range(0, count, size)]
    results = []
    with progress_bar(title, len(indices)) as advance:
        for batch in target_batches(data, indices, parts=num_parts(trainable.trainable, size)):
            results.append(np.asarray(compiled(*arrays, batch)))
            advance()
    return np.concatenate(results)[:count]


def sequence_logprobs(
    config: ModelConfig, params: Params, adapter: Adapter | None, batch: Batch
) -> Float[Array, "pairs 2"]:
    """Return the log-probability of each completion given its prompt, in float32.

    Args:
        config: architecture of the model.
        params: weights of the model.
        adapter: LoRA factors to add, or None.
        batch: a batch that `target_batches` yields for the arrays of `pad_pairs`.
    """
    tokens = rearrange(jnp.asarray(batch["tokens"]), "b s t -> (b s) t")
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    logprobs = token_logprobs(
        params,
        adapter,
        tokens,
        config=config,
        positions=positions,
        target_index=jnp.asarray(batch["target_index"]),
    )
    return _sum_by_completion(logprobs * batch["weights"], batch)


def _sum_by_completion(
    values: Float[Array, "parts targets"], batch: Batch
) -> Float[Array, "pairs 2"]:
    """Sum over the target tokens of each completion."""
    pairs, _, length = batch["tokens"].shape
    rows = jnp.arange(2 * pairs // len(values))
    # A masked sum, so that the gradient is not a scatter.
    belongs = batch["target_index"][..., None] // length == rows
    return jnp.where(belongs, values[..., None], 0).sum(1).reshape(pairs, 2)


def pad_pairs(pairs: Sequence[TokenPair], max_seq_len: int) -> dict[str, np.ndarray]:
    """Return pairs as padded arrays.

    The length is rounded up to a multiple of 64, so that rounds of similar length share a compiled
    step.

    Args:
        pairs: at least one pair.
        max_seq_len: the model's maximum sequence length.

    Returns:
        `tokens` [pairs, 2, time] int32, and `weights` [pairs, 2, time] float32, 1 on completions.

    Raises:
        UserError: there are no pairs, or a pair is longer than `max_seq_len`.
    """
    if not pairs:
        raise UserError("DPO: no preference pairs to train on")
    longest = max(len(side) for pair in pairs for side in (pair.chosen, pair.rejected))
    if longest > max_seq_len:
        raise UserError(
            f"DPO: a pair has {longest} tokens, but the model's maximum sequence length is "
            f"{max_seq_len}; shorten it, or lower max_length"
        )
    length = min(-(-longest // 64) * 64, max_seq_len)
    tokens = np.zeros((len(pairs), 2, length), np.int32)
    weights = np.zeros((len(pairs), 2, length), np.float32)
    for index, pair in enumerate(pairs):
        for side, text in enumerate((pair.chosen, pair.rejected)):
            tokens[index, side, : len(text)] = text.prompt + text.target
            weights[index, side, len(text.prompt) : len(text)] = 1.0
    return {"tokens": tokens, "weights": weights}
