"""Host memory for tensors: aligned so that JAX takes it over uncopied, and lent again and again.

A fresh page costs a fault, which for large arrays takes three times as long as to fill it.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable

import numpy as np

Allocate = Callable[[tuple[int, ...], np.dtype], np.ndarray]

ALIGNMENT = 64  # bytes; what XLA asks for on a CPU


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An array that `jax.device_put` does not copy on a CPU."""
    return _shaped(_raw(shape, dtype), shape, dtype)


class BufferPool:
    """Aligned arrays whose memory is used again once it is given back.

    Lend and give back from as many threads as you like.
    """

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._lent: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def lent(self) -> int:
        """How many arrays have not been given back."""
        return len(self._lent)

    def acquire(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """As `aligned_empty`, in the smallest memory at hand that fits."""
        size = math.prod(shape) * dtype.itemsize + ALIGNMENT
        with self._lock:
            # A vector in the place of a matrix would have the next matrix find none.
            fitting = [
                place for place, raw in enumerate(self._free) if size <= raw.size <= 4 * size
            ]
            if fitting:
                raw = self._free.pop(min(fitting, key=lambda place: self._free[place].size))
            else:
                raw = _raw(shape, dtype)
            self._lent[id(raw)] = raw
        return _shaped(raw, shape, dtype)

    def release(self, arrays: Iterable[np.ndarray]) -> None:
        """What nobody reads any more; arrays that were not lent here are left alone."""
        with self._lock:
            raws = [self._lent.pop(id(array.base), None) for array in arrays]
            self._free += [raw for raw in raws if raw is not None]


def _raw(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    return np.empty(math.prod(shape) * dtype.itemsize + ALIGNMENT, np.uint8)


def _shaped(raw: np.ndarray, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    start = -raw.ctypes.data % ALIGNMENT
    return raw[start : start + math.prod(shape) * dtype.itemsize].view(dtype).reshape(shape)
