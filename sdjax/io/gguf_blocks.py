"""Element types of GGUF: bytes per block, and dequantization.

Formats and bit layouts are those of llama.cpp (ggml-common.h and ggml-quants.c). A block has 32 or
256 elements of one row, with scales of their own. Everything is computed in float32, in llama.cpp's
order.

Axes: n (blocks), b (bytes of a block), k (elements of a block).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from jaxtyping import Float32, UInt8

Blocks = UInt8[np.ndarray, "n b"]
_FOUR_BITS = np.array(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32
)


class ElementType(NamedTuple):
    """An element type.

    Attributes:
        name: its name in llama.cpp.
        elements: elements of a block.
        bytes: bytes of a block.
        dtype: dtype of the elements as they are read.
        decode: returns the elements of blocks [n, b] as [n, k]; None if they are stored as `dtype`.
    """

    name: str
    elements: int
    bytes: int
    dtype: np.dtype
    decode: Callable[[Blocks], Float32[np.ndarray, "n k"]] | None = None


def _split(blocks: Blocks, *sizes: int) -> list[np.ndarray]:
    """Return consecutive parts of each block."""
    return np.split(blocks, np.cumsum(sizes[:-1]), axis=1)


def _bits(packed: np.ndarray, width: int, group: int) -> np.ndarray:
    """Return the numbers of `width` bits in bytes: low bits of a group of bytes first."""
    shifts = np.arange(0, 8, width, dtype=np.uint8)[:, None]
    numbers = packed.reshape(len(packed), -1, 1, group) >> shifts & np.uint8(2**width - 1)
    return numbers.reshape(len(packed), -1)


def _half(packed: np.ndarray) -> Float32[np.ndarray, "n 1"]:
    return np.ascontiguousarray(packed).view(np.float16).astype(np.float32)


def _scaled(scales: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """Multiply numbers [n, k] by the scales [n, groups] of equal groups of them."""
    grouped = numbers.astype(np.float32).reshape(*scales.shape, -1)
    return (scales[..., None] * grouped).reshape(len(scales), -1)


def _shifted(scales: np.ndarray, numbers: np.ndarray, minima: np.ndarray) -> np.ndarray:
    grouped = numbers.astype(np.float32).reshape(*scales.shape, -1)
    return (scales[..., None] * grouped - minima[..., None]).reshape(len(scales), -1)


def _q4_0(blocks: Blocks) -> np.ndarray:
    scale, low = _split(blocks, 2, 16)
    return _half(scale) * (_bits(low, 4, 16).astype(np.float32) - 8)


def _q4_1(blocks: Blocks) -> np.ndarray:
    scale, minimum, low = _split(blocks, 2, 2, 16)
    return _half(scale) * _bits(low, 4, 16).astype(np.float32) + _half(minimum)


def _q5_0(blocks: Blocks) -> np.ndarray:
    scale, high, low = _split(blocks, 2, 4, 16)
    numbers = _bits(low, 4, 16) | _bits(high, 1, 1) << 4
    return _half(scale) * (numbers.astype(np.float32) - 16)


def _q5_1(blocks: Blocks) -> np.ndarray:
    scale, minimum, high, low = _split(blocks, 2, 2, 4, 16)
    numbers = _bits(low, 4, 16) | _bits(high, 1, 1) << 4
    return _half(scale) * numbers.astype(np.float32) + _half(minimum)


def _q8_0(blocks: Blocks) -> np.ndarray:
    scale, numbers = _split(blocks, 2, 32)
    return numbers.view(np.int8).astype(np.float32) * _half(scale)


def _q2_k(blocks: Blocks) -> np.ndarray:
    scales, low, scale, minimum = _split(blocks, 16, 64, 2, 2)
    factors = _half(scale) * (scales & 15).astype(np.float32)
    minima = _half(minimum) * (scales >> 4).astype(np.float32)
    return _shifted(factors, _bits(low, 2, 32), minima)


def _q3_k(blocks: Blocks) -> np.ndarray:
    high, low, packed, scale = _split(blocks, 32, 64, 12, 2)
    scales = _bits(packed[:, :8], 4, 8) | _bits(packed[:, 8:], 2, 4) << 4
    numbers = _bits(low, 2, 32).astype(np.float32) - 4 * (1 - _bits(high, 1, 32).astype(np.float32))
    return _scaled(_half(scale) * (scales.astype(np.float32) - 32), numbers)


def _six_bits(packed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the 8 scales and 8 minima of 6 bits each in 12 bytes."""
    scales, minima, rest = _split(packed, 4, 4, 4)
    return (
        np.concatenate([scales & 63, rest & 15 | scales >> 2 & 48], axis=1).astype(np.float32),
        np.concatenate([minima & 63, rest >> 4 | minima >> 2 & 48], axis=1).astype(np.float32),
    )


def _q4_k(blocks: Blocks) -> np.ndarray:
    scale, minimum, packed, low = _split(blocks, 2, 2, 12, 128)
    scales, minima = _six_bits(packed)
    return _shifted(_half(scale) * scales, _bits(low, 4, 32), _half(minimum) * minima)


def _q5_k(blocks: Blocks) -> np.ndarray:
    scale, minimum, packed, high, low = _split(blocks, 2, 2, 12, 32, 128)
    scales, minima = _six_bits(packed)
    numbers = _bits(low, 4, 32) | _bits(high, 1, 32) << 4
    return _shifted(_half(scale) * scales, numbers, _half(minimum) * minima)


def _q6_k(blocks: Blocks) -> np.ndarray:
    low, high, scales, scale = _split(blocks, 128, 64, 16, 2)
    numbers = (_bits(low, 4, 64) | _bits(high, 2, 32) << 4).astype(np.float32) - 32
    return _scaled(_half(scale) * scales.view(np.int8).astype(np.float32), numbers)


def _iq4_nl(blocks: Blocks) -> np.ndarray:
    scale, low = _split(blocks, 2, 16)
    return _half(scale) * _FOUR_BITS[_bits(low, 4, 16)]


def _iq4_xs(blocks: Blocks) -> np.ndarray:
    scale, high, low, packed = _split(blocks, 2, 2, 4, 128)
    scales = (_bits(low, 4, 1) | _bits(high, 2, 1) << 4).astype(np.float32) - 32
    return _scaled(_half(scale) * scales, _FOUR_BITS[_bits(packed, 4, 16)])


def _stored(name: str, scalar: Any) -> ElementType:
    dtype = np.dtype(scalar)
    return ElementType(name, 1, dtype.itemsize, dtype)


def _block(
    name: str, elements: int, size: int, decode: Callable[[Blocks], np.ndarray]
) -> ElementType:
    return ElementType(name, elements, size, np.dtype(np.float32), decode)


# By their numbers in a file.
ELEMENT_TYPES: dict[int, ElementType] = {
    0: _stored("F32", np.float32),
    1: _stored("F16", np.float16),
    2: _block("Q4_0", 32, 18, _q4_0),
    3: _block("Q4_1", 32, 20, _q4_1),
    6: _block("Q5_0", 32, 22, _q5_0),
    7: _block("Q5_1", 32, 24, _q5_1),
    8: _block("Q8_0", 32, 34, _q8_0),
    10: _block("Q2_K", 256, 84, _q2_k),
    11: _block("Q3_K", 256, 110, _q3_k),
    12: _block("Q4_K", 256, 144, _q4_k),
    13: _block("Q5_K", 256, 176, _q5_k),
    14: _block("Q6_K", 256, 210, _q6_k),
    20: _block("IQ4_NL", 32, 18, _iq4_nl),
    23: _block("IQ4_XS", 256, 136, _iq4_xs),
    28: _stored("F64", np.float64),
    30: _stored("BF16", ml_dtypes.bfloat16),
}
# Others, which are refused by name.
UNSUPPORTED_TYPES: dict[int, str] = {
    **{16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S", 22: "IQ2_S"},
    **{24: "I8", 25: "I16", 26: "I32", 27: "I64", 29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0"},
    **{39: "MXFP4", 40: "NVFP4", 41: "Q1_0"},
}
