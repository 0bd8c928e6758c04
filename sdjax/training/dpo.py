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
from sdjax.training.jit_cache import JitCache
from sdjax.training.logprobs import token_logprobs
from sdjax.training.losses import LOSSES
from sdjax.training.packing import Example, bucket_size, target_batches
from sdjax.training.trainable import Assemble, Trainable
from sdjax.training.types import Batch, Metrics


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenPair:
    """A preference pair: two completions with their prompts, ending with end-of-sequence."""

    chosen: Example
    rejected: Example


@dataclasses.dataclass(frozen=True, kw_only=True)
class DPOLoss:
    """Loss function for batches of pairs: the preference loss plus `nll_weight` times NLL.

    Metrics have TRL's names; `dpo_loss` is the preference loss alone, and `nll_loss` is the mean
    negative log-likelihood per token of the chosen completions.

    Attributes:
        config: architecture of the model.
        assemble: combines trainable and frozen arrays into a model.
        loss: name of the preference loss.
        beta: strength of the pull toward the reference model.
        label_smoothing: probability that the sides of a pair are swapped.
        nll_weight: weight of the negative log-likelihood.
    """

    config: ModelConfig
    assemble: Assemble
    loss: str
    beta: float
    label_smoothing: float
    nll_weight: float

    def __call__(self, trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and metrics of a batch; the arguments are those of `fit`."""
        policy = sequence_logprobs(self.config, *self.assemble(trainable, frozen), batch)
        log_ratios = policy - batch["reference"]
        lengths = _sum_by_completion(jnp.asarray(batch["weights"]), batch)
        rewards = self.beta * log_ratios
        reward_margin = rewards[:, 0] - rewards[:, 1]
        nll = -(policy[:, 0] / lengths[:, 0]).mean()
        losses = LOSSES[self.loss](log_ratios, lengths, self.beta, self.label_smoothing)
        value = losses.mean()
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
        return value + self.nll_weight * nll, metrics


def dpo_loss(config: ModelConfig, assemble: Assemble, dpo: DPOConfig) -> DPOLoss:
    """Return the loss function of a DPO config."""
    return DPOLoss(
        config=config,
        assemble=assemble,
        loss=dpo.loss,
        beta=dpo.beta,
        label_smoothing=dpo.label_smoothing or 0.0,
        nll_weight=dpo.nll_weight,
    )


def reference_logprobs(
    trainable: Trainable,
    data: dict[str, np.ndarray],
    dpo: DPOConfig,
    *,
    title: str = "reference",
    jit_cache: JitCache | None = None,
) -> np.ndarray:
    """Return the log-probability of each completion under the reference: [pairs, 2] float32.

    Must be called before the first update. A completion that occurs in several pairs is computed
    once.

    Args:
        trainable: the policy.
        data: pairs, in the form returned by `pad_pairs`.
        dpo: config; `reference` selects the model, `batch_size` sets the pairs per batch.
        title: text in front of the progress bar.
        jit_cache: cache of the jitted function, if several rounds share one.
    """
    arrays = (trainable.trainable, trainable.frozen)
    logprobs = ReferenceLogprobs(
        config=trainable.config, assemble=trainable.assemble, reference=dpo.reference
    )
    compiled = (jit_cache or JitCache()).jit(logprobs, out_shardings=replicated(arrays))
    firsts, completions = _distinct_completions(data)
    # The last batch wraps around, so that all batches have the same shape.
    count, rows = len(firsts), 2 * dpo.batch_size
    filled = firsts[np.arange(-(-count // rows) * rows) % count]
    distinct = {
        name: rearrange(data[name], "b s t -> (b s) t")[filled].reshape(-1, 2, data[name].shape[-1])
        for name in ("tokens", "weights")
    }
    indices = list(np.arange(len(filled) // 2).reshape(-1, dpo.batch_size))
    parts = num_parts(trainable.trainable, dpo.batch_size)
    results = []
    with progress_bar(title, len(indices)) as advance:
        for batch in target_batches(distinct, indices, parts=parts):
            results.append(np.asarray(compiled(*arrays, batch)))
            advance()
    return np.concatenate(results).ravel()[completions].reshape(-1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceLogprobs:
    """Function that returns the log-probabilities of a batch's completions under the reference.

    Attributes:
        config: architecture of the model.
        assemble: combines trainable and frozen arrays into a model.
        reference: "policy", or "seed" for the model without its adapter.
    """

    config: ModelConfig
    assemble: Assemble
    reference: str

    def __call__(self, trainable: Any, frozen: Any, batch: Batch) -> Float[Array, "pairs 2"]:
        """Return the log-probabilities of a batch as `target_batches` yields it."""
        params, adapter = self.assemble(trainable, frozen)
        if self.reference == "seed":
            adapter = None
        return sequence_logprobs(self.config, params, adapter, batch)


def _distinct_completions(data: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the first of each group of equal completions, and the groups of all."""
    tokens, weights = (rearrange(data[name], "b s t -> (b s) t") for name in ("tokens", "weights"))
    groups: dict[bytes, int] = {}
    members = [
        groups.setdefault(row.tobytes() + weight.tobytes(), len(groups))
        for row, weight in zip(tokens, weights > 0, strict=True)
    ]
    firsts = np.unique(members, return_index=True)[1]
    return firsts, np.array(members)


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

    The length is rounded up to a bucket size, so that rounds of similar length share a compiled
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
    length = min(bucket_size(longest), max_seq_len)
    tokens = np.zeros((len(pairs), 2, length), np.int32)
    weights = np.zeros((len(pairs), 2, length), np.float32)
    for index, pair in enumerate(pairs):
        for side, text in enumerate((pair.chosen, pair.rejected)):
            tokens[index, side, : len(text)] = text.prompt + text.target
            weights[index, side, len(text.prompt) : len(text)] = 1.0
    return {"tokens": tokens, "weights": weights}
