"""Supervised fine-tuning: maximum likelihood of targets behind prompts.

Axes: B rows, T tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from sdjax.models.config import ModelConfig
from sdjax.models.tree import flatten, unflatten
from sdjax.training.fit import Loss
from sdjax.training.logprobs import token_logprobs


def sft_loss(config: ModelConfig) -> Loss:
    """The mean negative log-likelihood of the weighted tokens of packed rows.

    The trained and the frozen tensors are flat dicts from path to tensor, which together make
    up the model.
    """

    def loss(
        trainable: dict[str, jax.Array], frozen: dict[str, jax.Array], batch: dict[str, jax.Array]
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        logprobs = token_logprobs(
            unflatten(frozen | trainable),
            None,
            batch["tokens"],
            config=config,
            positions=batch["positions"],
            segments=batch["segments"],
        )
        weights = batch["weights"][:, 1:]
        count = jnp.maximum(weights.sum(), 1.0)
        return -(logprobs * weights).sum() / count, {"tokens": weights.sum()}

    return loss


def split(params: dict, trained: set[str]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """The tensors to train, in float32, and the rest, both as flat dicts."""
    leaves = flatten(params)
    trainable = {path: leaf.astype(jnp.float32) for path, leaf in leaves.items() if path in trained}
    return trainable, {path: leaf for path, leaf in leaves.items() if path not in trained}
