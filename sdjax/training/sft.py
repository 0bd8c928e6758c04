"""Supervised fine-tuning: maximum likelihood of targets behind prompts.

Axes: B rows, T tokens, G parts of a batch, K trained tokens of each.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.models.config import ModelConfig
from sdjax.training.fit import Loss
from sdjax.training.logprobs import token_logprobs
from sdjax.training.trainable import Assemble, as_tensors


def sft_loss(config: ModelConfig, assemble: Assemble | None = None) -> Loss:
    """The mean negative log-likelihood of the weighted tokens of packed rows.

    A batch is what `pack` or `behind_prefix` makes, with `weights` [B, T], or with `at` and
    `weights` [G, K] by `batches_of`. By default the trained and the frozen are flat dicts of
    tensors.
    """
    assembled = assemble or as_tensors()

    def loss(
        trainable: dict, frozen: dict, batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        at = batch.get("at")
        logprobs = token_logprobs(
            *assembled(trainable, frozen),
            batch["tokens"],
            config=config,
            positions=batch["positions"],
            segments=batch.get("segments"),
            prefix=batch.get("prefix"),
            at=at,
        )
        weights = batch["weights"][:, 1:] if at is None else batch["weights"]
        count = jnp.maximum(weights.sum(), 1.0)
        return -(logprobs * weights).sum() / count, {"tokens": weights.sum()}

    return loss
