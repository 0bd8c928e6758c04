"""Reader of tensors whose elements are in files as they are, at a known offset."""

from __future__ import annotations

import abc
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from sdjax.io.safetensors_writer import raw_bytes
from sdjax.io.tensor_reader import (
    MAX_BLOCK_BYTES,
    TensorInfo,
    TensorReader,
    allocated,
    read_range,
)
from sdjax.xla.alignment import Allocate, aligned_empty


class StoredReader(TensorReader):
    """Reader of tensors that a file contains element by element."""

    @abc.abstractmethod
    def path(self, name: str) -> Path:
        """Return the file of a tensor."""

    def strides(self, name: str) -> tuple[int, ...]:
        """Return the steps between the elements along each axis, in elements."""
        return row_major(self.info(name).shape)

    def info(self, name: str) -> TensorInfo:
        """Return the shape, dtype and offset of a tensor."""
        return self.infos([name])[name]

    def where(self, name: str) -> str:
        """Return the file and the tensor as the subject of an error message."""
        return f"{self.path(name)}: the tensor {name!r}"

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        """Read a tensor in its stored dtype."""
        info = self.info(name)
        array = allocated(allocate, info, self.where(name))
        self._read_into(array, name, info.offset)
        return array

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor, one slice per axis, in its stored dtype.

        Rows are read whole, in blocks of `MAX_BLOCK_BYTES`.
        """
        info, strides = self.info(name), self.strides(name)
        bounds = [part.indices(size)[:2] for part, size in zip(box, info.shape, strict=True)]
        result = np.empty([max(stop - start, 0) for start, stop in bounds], info.dtype)
        itemsize = info.dtype.itemsize
        first = info.offset + itemsize * _dot([start for start, _ in bounds], strides)
        if not result.ndim:
            self._read_into(result, name, first)
            return result
        rows = len(result)
        if strides[0] >= max(strides):  # otherwise each row is spread over the whole tensor
            rows = MAX_BLOCK_BYTES // max(1, itemsize * strides[0])
        rows = max(1, rows)
        for start in range(0, len(result), rows):
            block = result[start : start + rows]
            self._read_into(block, name, first + start * strides[0] * itemsize)
        return result

    def _read_into(self, array: np.ndarray, name: str, offset: int) -> None:
        """Fill an array with elements of a tensor, the first of them at an offset of the file."""
        if not array.size:
            return
        strides = self.strides(name)
        path, where = self.path(name), self.where(name)
        if array.flags.c_contiguous and _is_row_major(array.shape, strides):
            read_range(path, offset, raw_bytes(array), where)
            return
        # Everything from the first element to the last, of which the array's are a part.
        last = _dot([size - 1 for size in array.shape], strides)
        span = np.empty((last + 1) * array.itemsize, np.uint8)
        read_range(path, offset, raw_bytes(span), where)
        steps = [stride * array.itemsize for stride in strides]
        array[...] = np.ndarray(array.shape, array.dtype, span, 0, steps)


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps along each axis of an array stored row by row, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    return all(
        size == 1 or stride == step
        for size, stride, step in zip(shape, strides, row_major(shape), strict=True)
    )


def _dot(first: Iterable[int], second: Iterable[int]) -> int:
    return sum(a * b for a, b in zip(first, second, strict=True))
