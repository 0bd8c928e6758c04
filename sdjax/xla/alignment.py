"""Host arrays with the alignment that XLA requires to use them on the CPU without a copy.

NumPy aligns arrays to 16 bytes only, so `jax.device_put` would copy most of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]

ALIGNMENT = 64  # bytes


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Allocate an array that `jax.device_put` does not copy on the CPU."""
    return aligned_view(np.empty(unaligned_size(shape, dtype), np.uint8), shape, dtype)


def unaligned_size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the bytes of a buffer in which an aligned array fits wherever the buffer starts."""
    return math.prod(shape) * dtype.itemsize + ALIGNMENT


def aligned_view(buffer: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return the first aligned array in a uint8 buffer of at least `unaligned_size` bytes."""
    start = -buffer.ctypes.data % ALIGNMENT
    return buffer[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
