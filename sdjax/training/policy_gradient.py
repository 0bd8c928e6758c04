"""Policy gradient on samples with advantages, as an alternative to preference pairs.

The loss is PPO's clipped surrogate (equation 7 of Schulman et al. 2017, arXiv 1707.06347), since a
round takes several steps on the same samples. The advantages come from elsewhere, such as
`sdjax.training.advantages`.

Axes: see `sdjax.training.types`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from sdjax.core.progress import progress_bar
from sdjax.decoding.sampling import Sampling, warp_logits
from sdjax.models.config import ModelConfig
from sdjax.sharding.rules import replicated
from sdjax.training.config import RunTrainingConfig
from sdjax.training.fit import num_parts
from sdjax.training.jit_cache import JitCache
from sdjax.training.logprobs import token_logprobs
from sdjax.training.packing import Example, bucket_size, target_batches
from sdjax.training.trainable import Assemble, Trainable
from sdjax.training.types import Batch, Metrics

# Largest weight that corrects for sampling at another temperature or with top-p, as in truncated
# importance sampling (Ionides 2008); beyond it, one token would dominate a batch.
MAX_CORRECTION = 2.0
_MAX_LOG_RATIO = 20.0  # of a token; beyond it, the ratio of float32 probabilities may overflow
_UNWARPED = Sampling(temperature=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdvantageExample:
    """A sampled completion with its prompt and its advantage."""

    example: Example
    advantage: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyGradientLoss:
    """Loss function for batches of samples: the negative clipped surrogate, averaged over tokens.

    Attributes:
        config: architecture of the model.
        assemble: combines trainable and frozen arrays into a model.
        clip_range: the ratio of a token's probabilities is clipped to 1 plus or minus this.
    """

    config: ModelConfig
    assemble: Assemble
    clip_range: float

    def __call__(self, trainable: Any, frozen: Any, batch: Batch) -> tuple[jax.Array, Metrics]:
        """Return the loss and metrics of a batch; the arguments are those of `fit`."""
        logprobs = _target_logprobs(self.config, self.assemble, trainable, frozen, batch)
        start, advantages = (_at_targets(batch[name], batch) for name in ("start", "advantages"))
        weights = jnp.asarray(batch["weights"])
        log_ratios = jnp.clip(logprobs - start, -_MAX_LOG_RATIO, _MAX_LOG_RATIO)
        surrogate = clipped_surrogate(log_ratios, advantages, self.clip_range)
        is_clipped = surrogate < jnp.exp(log_ratios) * advantages
        count = jnp.maximum(weights.sum(), 1.0)

        def mean(values: jax.Array) -> jax.Array:
            return (values * weights).sum() / count

        return -mean(surrogate), {
            "clip_fraction": mean(is_clipped),
            "log_ratio": mean(log_ratios),
            "tokens": weights.sum(),
        }


def clipped_surrogate(
    log_ratios: Float[Array, "parts targets"],
    advantages: Float[Array, "parts targets"],
    clip_range: float,
) -> Float[Array, "parts targets"]:
    """Return PPO's surrogate of each token, min(r A, clip(r, 1 - c, 1 + c) A).

    Args:
        log_ratios: log-probabilities under the policy minus those before the first update.
        advantages: advantage of each token.
        clip_range: c.
    """
    ratios = jnp.exp(log_ratios)
    clipped = jnp.clip(ratios, 1 - clip_range, 1 + clip_range)
    return jnp.minimum(ratios * advantages, clipped * advantages)


def policy_gradient_data(
    trainable: Trainable,
    examples: Sequence[AdvantageExample],
    config: RunTrainingConfig,
    *,
    sampling: Sampling,
    title: str = "samples",
    jit_cache: JitCache | None = None,
) -> dict[str, np.ndarray]:
    """Return samples as padded arrays, with the log-probabilities before the first update.

    The advantage of a token is that of its sample plus beta times (mean log ratio - its log ratio)
    to the reference, as in the code of TTT-Discover, and it is weighted by the probability of the
    token over the one it was sampled with, at most `MAX_CORRECTION`.

    Args:
        trainable: the policy that the samples come from.
        examples: at least one sample.
        config: sets `beta`, `reference` and `batch_size`. With `reference: policy` the log ratios
            are zero.
        sampling: how the samples were drawn from the policy.
        title: text in front of the progress bar.
        jit_cache: cache of the jitted functions, if several rounds share one.

    Returns:
        `tokens` [samples, time] int32, `weights` [samples, time] float32, 1 on completions, and
        `start` and `advantages` [samples, time] float32, of the token after each position.
    """
    data = _pad(examples, trainable.config.max_seq_len)

    def logprobs(sampling: Sampling, reference: str, name: str) -> np.ndarray:
        return _all_logprobs(
            *(trainable, data, config.batch_size),
            sampling=sampling,
            reference=reference,
            title=f"{title}, {name}",
            jit_cache=jit_cache or JitCache(),
        )

    start = sampled = reference = logprobs(_UNWARPED, "policy", "policy")
    if sampling != _UNWARPED:
        sampled = logprobs(sampling, "policy", "sampling")
    if config.reference != "policy":
        reference = logprobs(_UNWARPED, config.reference, "reference")
    is_target = np.pad(data["weights"][:, 1:], [(0, 0), (0, 1)])
    log_ratios = (start - reference) * is_target
    mean_ratio = log_ratios.sum() / is_target.sum()
    own = np.array([one.advantage for one in examples])[:, None]
    advantages = own + config.beta * (mean_ratio - log_ratios)
    correction = np.exp(np.minimum(start - sampled, np.log(MAX_CORRECTION)))
    advantages = (advantages * correction * is_target).astype(np.float32)
    return {**data, "start": start, "advantages": advantages}


def _pad(examples: Sequence[AdvantageExample], max_seq_len: int) -> dict[str, np.ndarray]:
    """Return tokens and weights of the samples, whose length is rounded up to a bucket size."""
    length = min(bucket_size(max(len(one.example) for one in examples)), max_seq_len)
    tokens = np.zeros((len(examples), length), np.int32)
    weights = np.zeros((len(examples), length), np.float32)
    for row, one in enumerate(examples):
        tokens[row, : len(one.example)] = one.example.prompt + one.example.target
        weights[row, len(one.example.prompt) : len(one.example)] = 1.0
    return {"tokens": tokens, "weights": weights}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _SampledLogprobs:
    """Function that returns the log-probabilities with which a batch's targets were sampled."""

    config: ModelConfig
    assemble: Assemble
    reference: str

    def __call__(
        self, trainable: Any, frozen: Any, batch: Batch, scalars: dict[str, jax.Array]
    ) -> Float[Array, "parts targets"]:
        return _target_logprobs(
            *(self.config, self.assemble, trainable, frozen, batch),
            scalars=scalars,
            reference=self.reference,
        )


def _all_logprobs(
    trainable: Trainable,
    data: dict[str, np.ndarray],
    batch_size: int,
    *,
    sampling: Sampling,
    reference: str,
    title: str,
    jit_cache: JitCache,
) -> np.ndarray:
    """Return the log-probability of the token after each position [samples, time], 0 elsewhere."""
    arrays = (trainable.trainable, trainable.frozen)
    compute = _SampledLogprobs(
        config=trainable.config, assemble=trainable.assemble, reference=reference
    )
    compiled = jit_cache.jit(compute, out_shardings=replicated(arrays))
    count, length = data["tokens"].shape
    # The last batch wraps around, so that all batches have the same shape.
    rows = np.arange(-(-count // batch_size) * batch_size) % count
    indices = list(rows.reshape(-1, batch_size))
    parts = num_parts(trainable.trainable, batch_size)
    results = np.zeros((count, length), np.float32)
    with progress_bar(title, len(indices)) as advance:
        for index, batch in zip(indices, target_batches(data, indices, parts=parts), strict=True):
            values = np.asarray(compiled(*arrays, batch, sampling.scalar_params()))
            joined = np.zeros((parts, batch_size // parts * length), np.float32)
            values = np.where(batch["weights"] > 0, values, 0)
            np.put_along_axis(joined, batch["target_index"], values, axis=1)
            results[index] = joined.reshape(batch_size, length)
            advance()
    return results


def _target_logprobs(
    config: ModelConfig,
    assemble: Assemble,
    trainable: Any,
    frozen: Any,
    batch: Batch,
    *,
    scalars: dict[str, jax.Array] | None = None,
    reference: str = "policy",
) -> Float[Array, "parts targets"]:
    """Return the log-probabilities of a batch's target tokens, after warping the logits."""
    params, adapter = assemble(trainable, frozen)
    tokens = jnp.asarray(batch["tokens"])

    warp = None
    if scalars is not None:  # temperature, top_p and min_p
        warp = jax.vmap(partial(warp_logits, **scalars))  # type: ignore[arg-type]
    return token_logprobs(
        params,
        None if reference == "seed" else adapter,
        tokens,
        config=config,
        positions=jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape),
        target_index=jnp.asarray(batch["target_index"]),
        warp=warp,
    )


def _at_targets(values: Any, batch: Batch) -> Float[Array, "parts targets"]:
    """Return the entries of an array [batch, time] at the target tokens."""
    index = jnp.asarray(batch["target_index"])
    joined = rearrange(jnp.asarray(values), "(g b) t -> g (b t)", g=len(index))
    return jnp.take_along_axis(joined, index, axis=1)
