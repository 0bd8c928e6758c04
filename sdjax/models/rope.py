"""Rotary position embeddings (Su et al. 2021, arXiv 2104.09864) and their context extensions.

The fields of the scaling types have the names of Hugging Face's `rope_parameters`. Frequencies are
constants of an executable; NumPy computes them in float32, in transformers' order of operations.

Axes: see `sdjax.models.types`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar, TypeAlias

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from sdjax.models.types import AnyArray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Linear scaling: positions divided by a factor (Chen et al. 2023, arXiv 2306.15595)."""

    kind: ClassVar[str] = "linear"
    attention_factor: ClassVar[float] = 1.0
    factor: float

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], max_seq_len: int) -> Linear:
        """Read the fields of `rope_parameters`."""
        return cls(factor=float(fields["factor"]))

    def scale(self, frequencies: np.ndarray, theta: float, max_length: int) -> np.ndarray:
        """Return the scaled frequencies."""
        return frequencies / np.float32(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Llama 3 scaling: only low frequencies divided by a factor (arXiv 2407.21783, §3.4.2)."""

    kind: ClassVar[str] = "llama3"
    attention_factor: ClassVar[float] = 1.0
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], max_seq_len: int) -> Llama3:
        """Read the fields of `rope_parameters`."""
        return cls(
            factor=float(fields["factor"]),
            low_freq_factor=float(fields["low_freq_factor"]),
            high_freq_factor=float(fields["high_freq_factor"]),
            original_max_position_embeddings=_original_context(fields, max_seq_len),
        )

    def scale(self, frequencies: np.ndarray, theta: float, max_length: int) -> np.ndarray:
        """Return the scaled frequencies."""
        rotations = self.original_max_position_embeddings * frequencies / (2 * np.pi)
        span = self.high_freq_factor - self.low_freq_factor
        kept = np.clip((rotations - self.low_freq_factor) / span, 0, 1)
        return ((1 - kept) * frequencies / self.factor + kept * frequencies).astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN scaling (Peng et al. 2023, arXiv 2309.00071, sections 3.2 to 3.4)."""

    kind: ClassVar[str] = "yarn"
    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], max_seq_len: int) -> Yarn:
        """Read the fields of `rope_parameters`."""
        original = _original_context(fields, max_seq_len)
        factor = float(fields.get("factor") or max_seq_len / original)
        attention_factor = fields.get("attention_factor")
        if attention_factor is None:
            mscale, mscale_all_dim = fields.get("mscale"), fields.get("mscale_all_dim")
            if mscale and mscale_all_dim:
                attention_factor = _yarn_mscale(factor, mscale)
                attention_factor /= _yarn_mscale(factor, mscale_all_dim)
            else:
                attention_factor = _yarn_mscale(factor, 1.0)
        return cls(
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=float(attention_factor),
            beta_fast=float(fields.get("beta_fast") or 32),
            beta_slow=float(fields.get("beta_slow") or 1),
            truncate=bool(fields.get("truncate", True)),
        )

    def scale(self, frequencies: np.ndarray, theta: float, max_length: int) -> np.ndarray:
        """Return the scaled frequencies."""
        rotary_dim = 2 * len(frequencies)

        def correction_dim(rotations: float) -> float:
            """Return the dimension that makes this many rotations within the original context."""
            span = self.original_max_position_embeddings / (rotations * 2 * math.pi)
            return rotary_dim * math.log(span) / (2 * math.log(theta))

        low, high = correction_dim(self.beta_fast), correction_dim(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, rotary_dim - 1)
        if low == high:
            high += 0.001
        ramp = np.clip((np.arange(len(frequencies)) - low) / (high - low), 0, 1)
        scaled = frequencies / self.factor * ramp + frequencies * (1 - ramp)
        return scaled.astype(np.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE scaling: one divisor per frequency (Ding et al. 2024, arXiv 2402.13753).

    The short divisors apply to sequences within the original context, the long ones beyond it.
    """

    kind: ClassVar[str] = "longrope"
    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any], max_seq_len: int) -> LongRope:
        """Read the fields of `rope_parameters`."""
        original = _original_context(fields, max_seq_len)
        attention_factor = fields.get("attention_factor")
        if attention_factor is None:
            factor = max(float(fields.get("factor") or max_seq_len / original), 1.0)
            attention_factor = math.sqrt(1 + math.log(factor) / math.log(original))
        return cls(
            short_factor=tuple(float(value) for value in fields["short_factor"]),
            long_factor=tuple(float(value) for value in fields["long_factor"]),
            original_max_position_embeddings=original,
            attention_factor=float(attention_factor),
        )

    def scale(self, frequencies: np.ndarray, theta: float, max_length: int) -> np.ndarray:
        """Return the scaled frequencies."""
        is_long = max_length > self.original_max_position_embeddings
        divisors = self.long_factor if is_long else self.short_factor
        return frequencies / np.asarray(divisors, np.float32)


# Each has `scale`, which maps the unscaled frequencies to those of sequences of at most
# `max_length` tokens, and `attention_factor`, by which cosines and sines are multiplied.
Scaling: TypeAlias = Linear | Llama3 | Yarn | LongRope
SCALINGS: dict[str, type[Scaling]] = {cls.kind: cls for cls in (Linear, Llama3, Yarn, LongRope)}

CosSin: TypeAlias = tuple[
    Float32[Array, "batch 1 time half_rotary"], Float32[Array, "batch 1 time half_rotary"]
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary position embedding of queries and keys.

    Attributes:
        theta: base of the wavelengths.
        partial: fraction of each head's dimensions that is rotated, starting at the first.
        scaling: scaling for contexts longer than the original one, or None.
    """

    theta: float = 10_000.0
    partial: float = 1.0
    scaling: Scaling | None = None

    def frequencies(self, head_dim: int, max_length: int) -> Float32[np.ndarray, " half_rotary"]:
        """Return the angular frequencies in radians per position.

        Args:
            head_dim: dimensions of one head.
            max_length: maximum length that the sequences will ever have.
        """
        rotary_dim = int(head_dim * self.partial)
        exponents = np.arange(0, rotary_dim, 2, dtype=np.float32) / np.float32(rotary_dim)
        frequencies = 1 / np.float32(self.theta) ** exponents
        if self.scaling is None:
            return frequencies
        return self.scaling.scale(frequencies, self.theta, max_length)


def rotary_cos_sin(
    positions: Int[AnyArray, "batch time"], rope: Rope, *, head_dim: int, max_length: int
) -> CosSin:
    """Return the cosines and sines of the rotation angles, with a singleton axis for the heads."""
    angles = positions[..., None].astype(jnp.float32) * rope.frequencies(head_dim, max_length)
    factor = 1.0 if rope.scaling is None else rope.scaling.attention_factor
    return factor * jnp.cos(angles)[:, None], factor * jnp.sin(angles)[:, None]


def apply_rotary(
    x: Float[Array, "batch heads time head_dim"], cos_sin: CosSin
) -> Float[Array, "batch heads time head_dim"]:
    """Rotate heads in float32; pairs consist of the two halves of the rotated dimensions."""
    cos, sin = cos_sin
    half = cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [half, 2 * half], axis=-1)
    rotated = [first * cos - second * sin, second * cos + first * sin, rest]
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)


def _original_context(fields: Mapping[str, Any], max_seq_len: int) -> int:
    return int(fields.get("original_max_position_embeddings") or max_seq_len)


def _yarn_mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0
