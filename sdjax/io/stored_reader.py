"""Reader of tensors whose elements are in files as they are, at a known offset."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the elements of a tensor are.

    Attributes:
        name: the tensor.
        path: its file.
        offset: its first byte in the file.
        info: its shape and dtype.
        strides: steps between the elements along each axis, in elements.
    """

    name: str
    path: Path
    offset: int
    info: TensorInfo
    strides: tuple[int, ...]

    @property
    def where(self) -> str:
        """The file and the tensor as the subject of an error message."""
        return f"{self.path}: the tensor {self.name!r}"


class StoredReader(TensorReader):
    """Reader of tensors that files contain element by element."""

    def __init__(self, folder: Path, places: Iterable[Place]):
        """Take the places of all tensors.

        Args:
            folder: the folder of the files.
            places: the places, in any order.
        """
        self.folder = folder
        self._places = {place.name: place for place in places}
        self._infos = {name: place.info for name, place in self._places.items()}

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._places))

    def infos(self, names: Iterable[str]) -> Mapping[str, TensorInfo]:
        """Return the shape and dtype of all tensors."""
        return self._infos

    def where(self, name: str) -> str:
        """Return the file and the tensor as the subject of an error message."""
        return self._places[name].where

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        """Read a tensor in its stored dtype."""
        place = self._places[name]
        array = allocated(allocate, place.info, place.where)
        if _is_row_major(place.info.shape, place.strides):
            read_range(place.path, place.offset, raw_bytes(array), place.where)
        else:
            _fill(array, place, place.offset)
        return array

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor, one slice per axis, in its stored dtype.

        Rows are read whole, in blocks of `MAX_BLOCK_BYTES`.
        """
        place = self._places[name]
        info, strides = place.info, place.strides
        bounds = [part.indices(size)[:2] for part, size in zip(box, info.shape, strict=True)]
        result = np.empty([max(stop - start, 0) for start, stop in bounds], info.dtype)
        itemsize = info.dtype.itemsize
        first = place.offset + itemsize * _dot([start for start, _ in bounds], strides)
        if not result.ndim:
            _fill(result, place, first)
            return result
        rows = len(result)
        if strides[0] >= max(strides):  # otherwise each row is spread over the whole tensor
            rows = MAX_BLOCK_BYTES // max(1, itemsize * strides[0])
        rows = max(1, rows)
        for start in range(0, len(result), rows):
            _fill(result[start : start + rows], place, first + start * strides[0] * itemsize)
        return result


def row_major(shape: Sequence[int]) -> tuple[int, ...]:
    """Return the steps along each axis of an array stored row by row, in elements."""
    return tuple(math.prod(shape[axis + 1 :]) for axis in range(len(shape)))


def _fill(array: np.ndarray, place: Place, offset: int) -> None:
    """Fill an array with elements of a tensor, the first of them at an offset of the file."""
    if not array.size:
        return
    if array.flags.c_contiguous and _is_row_major(array.shape, place.strides):
        read_range(place.path, offset, raw_bytes(array), place.where)
        return
    # Everything from the first element to the last, of which the array's are a part.
    last = _dot([size - 1 for size in array.shape], place.strides)
    span = np.empty((last + 1) * array.itemsize, np.uint8)
    read_range(place.path, offset, raw_bytes(span), place.where)
    steps = [stride * array.itemsize for stride in place.strides]
    array[...] = np.ndarray(array.shape, array.dtype, span, 0, steps)


def _is_row_major(shape: Sequence[int], strides: Sequence[int]) -> bool:
    return all(
        size == 1 or stride == step
        for size, stride, step in zip(shape, strides, row_major(shape), strict=True)
    )


def _dot(first: Iterable[int], second: Iterable[int]) -> int:
    return sum(a * b for a, b in zip(first, second, strict=True))
