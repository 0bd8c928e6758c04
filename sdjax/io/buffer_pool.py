"""Reusable host buffers, aligned so that JAX on the CPU uses them without a copy.

A newly allocated page costs a page fault, which for large arrays takes three times as long as
filling the page.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

import numpy as np

from sdjax.xla.alignment import aligned_view, unaligned_size


class BufferPool:
    """Pool of aligned buffers that are reused once they are released. Thread-safe."""

    def __init__(self) -> None:
        self._free: list[np.ndarray] = []
        self._acquired: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    @property
    def num_acquired(self) -> int:
        """Number of arrays that have not been released."""
        return len(self._acquired)

    def acquire(self, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """Return an aligned array, in the smallest free buffer that fits or in a new one."""
        size = unaligned_size(shape, dtype)
        with self._lock:
            # A vector must not occupy the buffer of a matrix, which the next matrix would need.
            fitting = [
                index for index, raw in enumerate(self._free) if size <= raw.size <= 4 * size
            ]
            if fitting:
                raw = self._free.pop(min(fitting, key=lambda index: self._free[index].size))
            else:
                raw = np.empty(size, np.uint8)
            self._acquired[id(raw)] = raw
        return aligned_view(raw, shape, dtype)

    def release(self, arrays: Iterable[np.ndarray]) -> None:
        """Make the buffers of arrays available again; arrays from elsewhere are ignored."""
        with self._lock:
            raws = [self._acquired.pop(id(array.base), None) for array in arrays]
            self._free += [raw for raw in raws if raw is not None]
