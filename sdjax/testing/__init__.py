"""Small models, a tokenizer and a compilation counter for tests of code that uses sdjax.

Nothing here depends on a test framework.

Examples:
    >>> config, params = tiny_model("gemma2")
    >>> params["embed"].shape == (config.vocab_size, config.hidden_size)
    True
"""

from __future__ import annotations

import contextlib
import dataclasses
import string
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.io.tokenizer import Tokenizer
from sdjax.models.config import ModelConfig
from sdjax.models.params import abstract_params
from sdjax.models.types import Params

__all__ = [
    "CompilationCounter",
    "count_compilations",
    "random_params",
    "tiny_config",
    "tiny_model",
    "tiny_tokenizer",
]

PAD_ID, EOS_ID, UNKNOWN_ID = 0, 1, 2
_ALPHABET = string.ascii_lowercase + string.digits + " \n.,:;!?+-*/=()<>_'\"[]{}"
_VOCAB_SIZE = 64


def tiny_config(family: str = "llama", **changes: Any) -> ModelConfig:
    """Return the config of a model with two layers and a few thousand parameters.

    Args:
        family: name in `sdjax.models.families.FAMILIES`.
        **changes: fields of `ModelConfig` to override.

    Examples:
        >>> tiny_config("qwen3", num_layers=3).num_layers
        3
    """
    config = ModelConfig(
        family=family,
        vocab_size=_VOCAB_SIZE,
        hidden_size=16,
        intermediate_size=24,
        num_layers=2,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        max_seq_len=32,
        eos_token_ids=(EOS_ID,),
    )
    return dataclasses.replace(config, **changes)


def tiny_model(
    family: str = "llama", *, seed: int = 0, dtype: Any = jnp.float32, **changes: Any
) -> tuple[ModelConfig, Params]:
    """Return a tiny config and random parameters for it.

    The parameters come from NumPy, because sampling them with JAX takes seconds of compilation.

    Args:
        family: name in `sdjax.models.families.FAMILIES`.
        seed: seed of the parameters.
        dtype: dtype of the parameters.
        **changes: fields of `ModelConfig` to override.
    """
    config = tiny_config(family, **changes)
    return config, random_params(config, seed=seed, dtype=dtype)


def random_params(config: ModelConfig, *, seed: int = 0, dtype: Any = jnp.float32) -> Params:
    """Sample parameters with NumPy: standard deviation 0.1, mean 1 for vectors and 0 otherwise."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: jnp.asarray(
            0.1 * rng.standard_normal(leaf.shape) + (leaf.ndim == 1), leaf.dtype
        ),
        abstract_params(config, dtype),
    )


def tiny_tokenizer() -> Tokenizer:
    """Return a character-level tokenizer with 64 tokens.

    The vocabulary has lowercase letters, digits, space, newline and common punctuation; any other
    character becomes the unknown token. There is no chat template and no start token.

    Examples:
        >>> tokenizer = tiny_tokenizer()
        >>> tokenizer.decode(tokenizer.encode("1+1=2", add_special=False))
        '1+1=2'
    """
    first = UNKNOWN_ID + 1
    ids = {character: first + index for index, character in enumerate(_ALPHABET)}
    names = ["<pad>", "<eos>", "<unk>", *_ALPHABET]

    def encode(text: str, add_special: bool) -> list[int]:
        return [ids.get(character, UNKNOWN_ID) for character in text]

    def decode(tokens: Sequence[int], skip_special: bool) -> str:
        start = first if skip_special else 0
        return "".join(names[token] for token in tokens if start <= token < len(names))

    return Tokenizer(
        folder=Path("tiny-tokenizer"),
        vocab_size=_VOCAB_SIZE,
        bos_id=None,
        eos_ids=(EOS_ID,),
        pad_id=PAD_ID,
        has_chat_template=False,
        _encode=encode,
        _decode=decode,
    )


@dataclasses.dataclass
class CompilationCounter:
    """The number of executables that XLA has compiled within `count_compilations`."""

    count: int = 0


@contextlib.contextmanager
def count_compilations() -> Iterator[CompilationCounter]:
    """Count the executables that XLA compiles within the block, across all threads.

    Examples:
        >>> double = jax.jit(lambda x: 2 * x)
        >>> x = jnp.arange(3)
        >>> with count_compilations() as compilations:
        ...     _ = double(x), double(x)
        >>> compilations.count
        1
    """
    counter = CompilationCounter()

    def listen(event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            counter.count += 1

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield counter
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
