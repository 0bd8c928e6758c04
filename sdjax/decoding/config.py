"""Sizes that a decoder is compiled for, and their choice for a set of prompts."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Annotated, ClassVar

import jax
import numpy as np
from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, NonNegativeInt, PositiveInt
from sdjax.core.errors import UserError
from sdjax.models.config import ModelConfig
from sdjax.sharding.memory import require_memory

# Choices of `fit_decoder_config`.
_MAX_BUCKETS = 3
_MAX_SLOTS = 32  # 64 multiply faster on two cores, but idle longer at the end
_MIN_PREFIX = 16  # a shorter common prefix is not worth a separate computation
_PREFILL_TOKENS = 8192  # per prefill call
_PREFILLS_PER_FILL = 16  # prefill calls that fill all slots once
_CPU_CACHE_BYTES = 1 << 30


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DecoderConfig:
    """Sizes that a decoder is compiled for.

    Attributes:
        slots: sequences decoded at the same time.
        prefill_batch: prompts per prefill call, at most `slots`. Free slots accumulate until they
            can be refilled by one call: a small number keeps the slots busy, a large one makes
            better use of the arithmetic units.
        buckets: padded prompt lengths, without the prefix, in ascending order.
        max_new_tokens: maximum number of tokens generated per prompt, including the stop token.
        prefix: tokens that all prompts begin with, such as few-shot examples or a system message;
            they are computed once per call.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = {"rows": "prefill_batch"}

    slots: PositiveInt = 64
    prefill_batch: PositiveInt = 32
    buckets: Annotated[tuple[PositiveInt, ...], Field(min_length=1)] = (32, 64, 128, 256)
    max_new_tokens: PositiveInt = 64
    prefix: tuple[NonNegativeInt, ...] = ()

    @model_validator(mode="after")
    def _check_sizes(self) -> DecoderConfig:
        if self.prefill_batch > self.slots:
            raise ValueError(
                f"prefill_batch ({self.prefill_batch}) must be at most slots ({self.slots})"
            )
        if list(self.buckets) != sorted(set(self.buckets)):
            raise ValueError(f"buckets {list(self.buckets)} must be distinct and ascending")
        return self


def check_length(model_config: ModelConfig, prompt_length: int, max_new_tokens: int) -> None:
    """Raise UserError if a prompt and its new tokens exceed the model's sequence length.

    Args:
        model_config: the model that will decode.
        prompt_length: tokens of the longest prompt, or the largest bucket.
        max_new_tokens: maximum number of tokens generated per prompt.
    """
    length = prompt_length + max_new_tokens
    if length > model_config.max_seq_len:
        raise UserError(
            f"prompts of up to {prompt_length} tokens and {max_new_tokens} new tokens require "
            f"{length} tokens, but the model's maximum sequence length is "
            f"{model_config.max_seq_len}; lower max_new_tokens, or shorten the prompts and buckets"
        )


def fit_decoder_config(
    model_config: ModelConfig,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    slots: int | None = None,
) -> DecoderConfig:
    """Choose decoder sizes for a set of prompts.

    Each bucket gets an equal share of the prompts.
    The common prefix of all prompts becomes the decoder's prefix if it is long enough.

    Args:
        model_config: the model that will decode.
        prompts: token ids of each prompt.
        max_new_tokens: maximum number of tokens generated per prompt.
        slots: sequences decoded at the same time; by default as many as `fit_slots` returns.

    Raises:
        UserError: no prompt fits into the model's context together with the new tokens.
    """
    prefix = common_prefix(prompts)
    if len(prefix) < _MIN_PREFIX:
        prefix = ()
    max_length = model_config.max_seq_len - max_new_tokens - len(prefix)
    lengths = np.array([len(prompt) - len(prefix) for prompt in prompts])
    lengths = lengths[lengths <= max_length]
    if not lengths.size:
        raise UserError(
            f"the shortest prompt has {min(map(len, prompts))} tokens, which with {max_new_tokens} "
            f"new ones exceeds the model's context of {model_config.max_seq_len}; lower "
            "--shots or --max-new-tokens"
        )
    count = min(_MAX_BUCKETS, lengths.size)
    quantiles = np.quantile(lengths, [(n + 1) / count for n in range(count)])
    buckets = sorted({min(max_length, -(-math.ceil(edge) // 8) * 8) for edge in quantiles})
    if slots is None:
        length = len(prefix) + buckets[-1] + max_new_tokens
        slots = fit_slots(model_config, length, lengths.size)
    return DecoderConfig(
        slots=slots,
        prefill_batch=max(1, min(slots // _PREFILLS_PER_FILL, _PREFILL_TOKENS // buckets[-1])),
        prefix=prefix,
        buckets=tuple(buckets),
        max_new_tokens=max_new_tokens,
    )


def fit_slots(model_config: ModelConfig, length: int, count: int) -> int:
    """Return the number of slots to decode some sequences with, as many as is efficient.

    Args:
        model_config: the model that will decode.
        length: maximum length of a sequence, with its prompt.
        count: number of sequences.
    """
    slots = min(_MAX_SLOTS, count)
    if jax.default_backend() == "cpu":
        slots = min(slots, max(1, _CPU_CACHE_BYTES // cache_bytes(model_config, length, 4)))
    return slots


def cache_bytes(model_config: ModelConfig, length: int, itemsize: int) -> int:
    """Return the size of the KV cache of one sequence.

    Args:
        model_config: the model that will decode.
        length: maximum length of the sequence, with its prompt.
        itemsize: bytes per element of the cache.
    """
    heads = model_config.num_layers * model_config.num_kv_heads
    return 2 * heads * model_config.head_dim * itemsize * length


def check_cache_memory(
    model_config: ModelConfig, config: DecoderConfig, length: int, itemsize: int, num_devices: int
) -> None:
    """Raise UserError if the slots cannot fit into the memory of the devices.

    Args:
        model_config: the model that will decode.
        config: sizes of the decoder.
        length: number of positions in the cache of one sequence.
        itemsize: bytes per element of the cache.
        num_devices: number of devices that the cache is divided over, at best.
    """
    tokens = 4 * config.max_new_tokens
    require_memory(
        config.slots * (cache_bytes(model_config, length, itemsize) + tokens),
        f"decoding {config.slots} sequences of up to {length} tokens at a time",
        num_devices=num_devices,
        remedy="lower the number of slots, or max_new_tokens",
    )


def common_prefix(prompts: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the longest prefix of all prompts that leaves each prompt at least one token."""
    columns = zip(*(prompt[:-1] for prompt in prompts), strict=False)
    return tuple(column[0] for column in itertools.takewhile(lambda c: len(set(c)) == 1, columns))
