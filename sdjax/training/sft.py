"""Supervised fine-tuning loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from sdjax.models.config import ModelConfig
from sdjax.training.logprobs import token_logprobs
from sdjax.training.trainable import Assemble, AssembleParams
from sdjax.training.types import Batch, LossFn, Metrics


def sft_loss(config: ModelConfig, assemble: Assemble | None = None) -> LossFn:
    """Return a loss function: mean negative log-likelihood of the weighted tokens.

    It accepts batches of `pack` or `prefix_batch`, with `weights` [batch, time], and batches of
    `target_batches`, with `target_index` and `weights` [parts, targets].

    Args:
        config: architecture of the model.
        assemble: combines trainable and frozen tensors; by default both are flat dicts.
    """
    assemble = assemble or AssembleParams()

    def loss(trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        batch = jax.tree.map(jnp.asarray, batch)
        target_index = batch.get("target_index")
        logprobs = token_logprobs(
            *assemble(trainable, frozen),
            batch["tokens"],
            config=config,
            positions=batch["positions"],
            segments=batch.get("segments"),
            prefix=batch.get("prefix"),
            target_index=target_index,
        )
        weights = batch["weights"][:, 1:] if target_index is None else batch["weights"]
        count = jnp.maximum(weights.sum(), 1.0)
        return -(logprobs * weights).sum() / count, {"tokens": weights.sum()}

    return loss
