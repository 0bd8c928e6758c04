"""Python API for training on tokenized data, used by `sdjax train` and the search loop."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.decoding.sampling import Sampling
from sdjax.sharding.memory import require_memory
from sdjax.training.config import DPOConfig, OptimizerConfig, RunTrainingConfig
from sdjax.training.dpo import TokenPair, dpo_loss, pad_pairs, reference_logprobs
from sdjax.training.fit import Checkpoints, fit, num_parts, rematerialize
from sdjax.training.jit_cache import JitCache
from sdjax.training.packing import Example, pack, shuffled_batches, target_batches
from sdjax.training.policy_gradient import (
    AdvantageExample,
    PolicyGradientLoss,
    policy_gradient_data,
)
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import Trainable
from sdjax.training.types import ArrayCache, Batch, LossFn, OnStep
from sdjax.training.warmstart import WarmstartData, warmstart_batches


def train_sft(
    trainable: Trainable,
    examples: Sequence[Example],
    config: OptimizerConfig,
    *,
    max_length: int,
    batch_size: int,
    key: jax.Array,
    remat: bool = False,
    title: str = "train",
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Fine-tune on examples by maximum likelihood of their targets (SFT).

    Args:
        trainable: model to train; its trainable arrays are donated.
        examples: prompts and targets, each at most `max_length` tokens.
        config: optimizer and number of steps.
        max_length: tokens per row; a row packs several examples.
        batch_size: rows per batch.
        key: PRNG key for shuffling the rows.
        remat: recompute activations in the backward pass to save memory.
        title: text in front of the progress bar.
        on_step: called after each step with its metrics.
        checkpoints: storage for the training state; nothing is stored by default.

    Returns:
        the trained pytree, shaped like `trainable.trainable`, and the metrics of each step.

    Raises:
        UserError: the loss is not finite.

    Examples:
        >>> import jax
        >>> import sdjax
        >>> from sdjax.training.config import OptimizerConfig
        >>> from sdjax.training.data import number_rows, tokenize_examples
        >>> from sdjax.training.trainable import full_finetune
        >>> config, params = sdjax.load_model("zoo:seed")
        >>> rows = number_rows("sums", [{"prompt": "1+1=", "completion": "2"}])
        >>> examples = tokenize_examples(rows, sdjax.load_tokenizer("zoo:seed"), max_length=16)
        >>> trained, history = sdjax.train_sft(
        ...     full_finetune(config, params),
        ...     examples,
        ...     OptimizerConfig(learning_rate=1e-3, max_steps=3),
        ...     max_length=16,
        ...     batch_size=1,
        ...     key=jax.random.key(0),
        ... )
        >>> history[-1]["loss"] < history[0]["loss"]
        True
    """
    _check_batch(trainable, batch_size, max_length)
    data = pack(examples, max_length)
    return _fit(
        trainable,
        sft_loss(trainable.config, trainable.assemble),
        _shuffled(trainable, data, config, batch_size, key),
        config,
        remat=remat,
        title=title,
        on_step=on_step,
        checkpoints=checkpoints,
    )


def train_dpo(
    trainable: Trainable,
    pairs: Sequence[TokenPair],
    config: DPOConfig,
    *,
    key: jax.Array,
    reference_cache: ArrayCache | None = None,
    remat: bool = False,
    title: str = "train",
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
    jit_cache: JitCache | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Train on preference pairs (DPO, Rafailov et al. 2023, arXiv 2305.18290).

    The reference log-probabilities are computed once, before the first update. The first loss is
    therefore log 2 (not with `loss: ipo`), plus `nll_weight` times the negative log-likelihood.

    Args:
        trainable: model to train; its trainable arrays are donated.
        pairs: chosen and rejected completions.
        config: loss, optimizer and number of steps; `epochs` are converted to steps.
        key: PRNG key for shuffling the pairs.
        reference_cache: storage for the reference log-probabilities, such as `cached_array` of
            `sdjax.training.checkpoints` with its first two arguments; nothing is stored by default.
        remat: recompute activations in the backward pass to save memory.
        title: text in front of the progress bar.
        on_step: called after each step with its metrics.
        checkpoints: storage for the training state; nothing is stored by default.
        jit_cache: cache of the compiled functions; rounds with equal settings that share one
            compile them once.

    Returns:
        the trained pytree, shaped like `trainable.trainable`, and the metrics of each step.

    Raises:
        UserError: there are no pairs, a pair is longer than the model's maximum sequence length,
            or the loss is not finite.

    Examples:
        >>> import jax
        >>> import sdjax
        >>> from sdjax.models.lora import init_adapter
        >>> from sdjax.training.config import DPOConfig
        >>> from sdjax.training.data import number_rows, tokenize_pairs
        >>> from sdjax.training.trainable import lora_finetune
        >>> config, params = sdjax.load_model("zoo:seed")
        >>> rows = number_rows("sums", [{"prompt": "1+1=", "chosen": "2", "rejected": "3"}])
        >>> pairs = tokenize_pairs(rows, sdjax.load_tokenizer("zoo:seed"), max_length=16)
        >>> adapter = init_adapter(config, jax.random.key(0), rank=4, alpha=8)
        >>> trained, history = sdjax.train_dpo(
        ...     lora_finetune(config, params, adapter),
        ...     pairs,
        ...     DPOConfig(max_steps=2, batch_size=1),
        ...     key=jax.random.key(1),
        ... )
        >>> round(history[0]["loss"], 4)
        0.6931
    """
    config = config.for_count(len(pairs))
    data = pad_pairs(pairs, trainable.config.max_seq_len)
    _check_batch(trainable, 2 * config.batch_size, data["tokens"].shape[-1])

    def compute_reference() -> np.ndarray:
        return reference_logprobs(
            trainable, data, config, title=f"{title}, reference", jit_cache=jit_cache
        )

    if reference_cache is None:
        data["reference"] = compute_reference()
    else:
        data["reference"] = reference_cache(compute_reference, data)
    return _fit(
        trainable,
        dpo_loss(trainable.config, trainable.assemble, config),
        _shuffled(trainable, data, config, config.batch_size, key),
        config,
        remat=remat,
        title=title,
        on_step=on_step,
        checkpoints=checkpoints,
        jit_cache=jit_cache,
    )


def train_policy_gradient(
    trainable: Trainable,
    examples: Sequence[AdvantageExample],
    config: RunTrainingConfig,
    *,
    sampling: Sampling,
    key: jax.Array,
    title: str = "train",
    jit_cache: JitCache | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Train on samples of the policy with advantages; see `sdjax.training.policy_gradient`.

    Args:
        trainable: model to train, which the samples come from; its trainable arrays are donated.
        examples: at least one sample, each at most as long as the model's maximum sequence length.
        config: optimizer and number of steps; `epochs` are converted to steps.
        sampling: how the samples were drawn.
        key: PRNG key for shuffling the samples.
        title: text in front of the progress bar.
        jit_cache: cache of the compiled functions; rounds with equal settings that share one
            compile them once.

    Returns:
        the trained pytree, shaped like `trainable.trainable`, and the metrics of each step.

    Raises:
        UserError: the loss is not finite.
    """
    config = config.for_count(len(examples))
    data = policy_gradient_data(
        trainable, examples, config, sampling=sampling, title=title, jit_cache=jit_cache
    )
    loss = PolicyGradientLoss(
        config=trainable.config, assemble=trainable.assemble, clip_range=config.clip_range
    )
    return _fit(
        trainable,
        loss,
        _shuffled(trainable, data, config, config.batch_size, key),
        config,
        remat=False,
        title=title,
        on_step=None,
        checkpoints=None,
        jit_cache=jit_cache,
    )


def train_warmstart(
    trainable: Trainable,
    data: WarmstartData,
    config: OptimizerConfig,
    *,
    batch_size: int,
    key: jax.Array,
    remat: bool = False,
    title: str = "train",
    on_step: OnStep | None = None,
    checkpoints: Checkpoints | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    """Fine-tune a generator on candidates that share one prompt.

    Args:
        trainable: model to train; its trainable arrays are donated.
        data: prompt and candidates.
        config: optimizer and number of steps.
        batch_size: candidates per batch.
        key: PRNG key for shuffling the candidates.
        remat: recompute activations in the backward pass to save memory.
        title: text in front of the progress bar.
        on_step: called after each step with its metrics.
        checkpoints: storage for the training state; nothing is stored by default.

    Returns:
        the trained pytree, shaped like `trainable.trainable`, and the metrics of each step.

    Raises:
        UserError: the prompt with the longest candidate exceeds the model's maximum sequence
            length, or the loss is not finite.
    """
    longest = len(data.prompt) + max(map(len, data.targets))
    if longest > trainable.config.max_seq_len:
        raise UserError(
            f"warm start: the prompt with the longest candidate has {longest} tokens, but the "
            f"model's maximum sequence length is {trainable.config.max_seq_len}; set "
            "prompt: short, or use another model"
        )
    _check_batch(trainable, batch_size, longest)
    batches = warmstart_batches(
        data, batch_size=batch_size, num_batches=config.num_batches, key=key
    )
    return _fit(
        trainable,
        sft_loss(trainable.config, trainable.assemble),
        batches,
        config,
        remat=remat,
        title=title,
        on_step=on_step,
        checkpoints=checkpoints,
    )


def _check_batch(trainable: Trainable, batch_size: int, length: int) -> None:
    """Raise UserError if not even one layer's activations of a batch fit into the memory."""
    require_memory(
        batch_size * length * trainable.config.hidden_size * 4,
        f"a batch of {batch_size} sequences of {length} tokens",
        num_devices=jax.device_count(),
        remedy="lower batch_size or the length of the sequences",
    )


def _shuffled(
    trainable: Trainable,
    data: dict[str, np.ndarray],
    config: OptimizerConfig,
    batch_size: int,
    key: jax.Array,
) -> Iterable[Batch]:
    """Return shuffled batches for all steps."""
    indices = shuffled_batches(
        len(data["tokens"]), batch_size=batch_size, num_batches=config.num_batches, key=key
    )
    return target_batches(data, list(indices), parts=num_parts(trainable.trainable, batch_size))


def _fit(
    trainable: Trainable,
    loss: LossFn,
    batches: Iterable[Batch],
    config: OptimizerConfig,
    *,
    remat: bool,
    title: str,
    on_step: OnStep | None,
    checkpoints: Checkpoints | None,
    jit_cache: JitCache | None = None,
) -> tuple[Any, list[dict[str, float]]]:
    return fit(
        rematerialize(loss) if remat else loss,
        trainable.trainable,
        trainable.frozen,
        batches,
        config,
        title=title,
        on_step=on_step,
        checkpoints=checkpoints,
        jit_cache=jit_cache,
    )
