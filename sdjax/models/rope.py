"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864), and how they are stretched.

A scaling's fields are named as in Hugging Face's `rope_parameters`. Frequencies are constants of
a compiled program: NumPy computes them in float32, in the order of transformers.

Axes: B batch, T tokens, H head dimension, R rotated part of it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Positions divided by a factor (Chen et al. 2023, arXiv 2306.15595)."""

    kind: ClassVar[str] = "linear"
    attention_factor: ClassVar[float] = 1.0
    factor: float

    @classmethod
    def read(cls, fields: Mapping[str, Any], context: int) -> Linear:
        return cls(factor=float(fields["factor"]))

    def stretch(self, plain: np.ndarray, theta: float, reach: int) -> np.ndarray:
        return plain / np.float32(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Low frequencies divided by a factor, high ones kept (arXiv 2407.21783, section 3.4.2)."""

    kind: ClassVar[str] = "llama3"
    attention_factor: ClassVar[float] = 1.0
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def read(cls, fields: Mapping[str, Any], context: int) -> Llama3:
        return cls(
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_position_embeddings=_original(fields, context),
        )

    def stretch(self, plain: np.ndarray, theta: float, reach: int) -> np.ndarray:
        turns = self.original_max_position_embeddings * plain / (2 * np.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((turns - self.low_freq_factor) / span, 0, 1)
        return ((1 - kept) * plain / self.factor + kept * plain).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (Peng et al. 2023, arXiv 2309.00071, sections 3.2 to 3.4)."""

    kind: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def read(cls, fields: Mapping[str, Any], context: int) -> Yarn:
        original = _original(fields, context)
        factor = float(fields.get("factor") or context / original)
        attention = fields.get("attention_factor")
        if attention is None:
            above, below = fields.get("mscale"), fields.get("mscale_all_dim")
            attention = _yarn_scale(factor, above if above and below else 1.0)
            if above and below:
                attention /= _yarn_scale(factor, below)
        return cls(
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=float(attention),
            beta_fast=float(fields.get("beta_fast") or 32),
            beta_slow=float(fields.get("beta_slow") or 1),
            truncate=bool(fields.get("truncate", True)),
        )

    def stretch(self, plain: np.ndarray, theta: float, reach: int) -> np.ndarray:
        size = 2 * len(plain)

        def dimension(turns: float) -> float:
            """The dimension that turns so often within the original context."""
            span = self.original_max_position_embeddings / (turns * 2 * math.pi)
            return size * math.log(span) / (2 * math.log(theta))

        low, high = dimension(self.beta_fast), dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, size - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(len(plain)) - low) / (high - low), 0, 1)
        return (plain / self.factor * ramp + plain * (1 - ramp)).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (Ding et al. 2024, arXiv 2402.13753): a divisor a frequency.

    There are two lists of them, for sequences within the original context and for longer ones.
    """

    kind: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    @classmethod
    def read(cls, fields: Mapping[str, Any], context: int) -> LongRope:
        original = _original(fields, context)
        attention = fields.get("attention_factor")
        if attention is None:
            factor = max(float(fields.get("factor") or context / original), 1.0)
            attention = math.sqrt(1 + math.log(factor) / math.log(original))
        return cls(
            short_factor=tuple(float(value) for value in fields["short_factor"]),
            long_factor=tuple(float(value) for value in fields["long_factor"]),
            original_max_position_embeddings=original,
            attention_factor=float(attention),
        )

    def stretch(self, plain: np.ndarray, theta: float, reach: int) -> np.ndarray:
        is_long = reach > self.original_max_position_embeddings
        divisors = self.long_factor if is_long else self.short_factor
        return plain / np.asarray(divisors, np.float32)


# Each has `stretch`, which makes the frequencies [R/2] of sequences of at most `reach` tokens from
# the plain ones, and `attention_factor`, by which cosines and sines are multiplied.
Scaling = Linear | Llama3 | Yarn | LongRope
SCALINGS: dict[str, type[Scaling]] = {kind.kind: kind for kind in (Linear, Llama3, Yarn, LongRope)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotation of queries and keys by their positions.

    Attributes:
        theta: the base of the wavelengths.
        partial: the share of a head's dimensions that is rotated, from the first on.
        scaling: for a context that is longer than the original one, or None.
    """

    theta: float = 10_000.0
    partial: float = 1.0
    scaling: Scaling | None = None

    def frequencies(self, head_dim: int, reach: int) -> np.ndarray:
        """Radians a position, [R/2] float32, for sequences of at most `reach` tokens."""
        size = int(head_dim * self.partial)
        exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
        plain = 1 / np.float32(self.theta) ** exponents
        return plain if self.scaling is None else self.scaling.stretch(plain, self.theta, reach)


def rotation(
    positions: jax.Array, rope: Rope, *, head_dim: int, reach: int
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines [B, 1, T, R/2] in float32 of positions [B, T]."""
    angles = positions[..., None].astype(jnp.float32) * rope.frequencies(head_dim, reach)
    size = 1.0 if rope.scaling is None else rope.scaling.attention_factor
    return size * jnp.cos(angles)[:, None], size * jnp.sin(angles)[:, None]


def rotate(x: jax.Array, turn: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Heads [B, N, T, H] turned in float32: the halves of the first R dimensions are the pairs."""
    cos, sin = turn
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    turned = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(turned, axis=-1).astype(x.dtype)


def _original(fields: Mapping[str, Any], context: int) -> int:
    return int(fields.get("original_max_position_embeddings") or context)


def _yarn_scale(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
