"""Interface of the readers of weights in all formats."""

from __future__ import annotations

import abc
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import TransientError, UserError
from sdjax.core.files import MAX_INDEX_BYTES, open_file, read_json_file
from sdjax.io.links import member
from sdjax.io.safetensors_writer import DTYPE_CODES, DTYPES, HF_DTYPES
from sdjax.xla.alignment import Allocate, aligned_empty

# Bytes of a tensor that are read at a time by those who need only a part of it.
MAX_BLOCK_BYTES = 2**24


T = TypeVar("T")


class TensorInfo(NamedTuple):
    """The shape and the dtype of a tensor."""

    shape: tuple[int, ...]
    dtype: np.dtype


class TensorReader(abc.ABC):
    """Reader of the tensors of a model or an adapter, one at a time.

    Attributes:
        folder: the folder of the files.
    """

    folder: Path

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that are read."""
        return (self.folder,)

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks on how tensors are converted while they are read."""
        return ()

    @property
    def adapted(self) -> frozenset[str]:
        """Names of the tensors that an adapter changes or replaces."""
        return frozenset()

    @property
    @abc.abstractmethod
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""

    @abc.abstractmethod
    def infos(self, names: Iterable[str]) -> Mapping[str, TensorInfo]:
        """Return the shape and dtype of at least these tensors, without reading them.

        The dtype may be that of a buffer (`STORED_DTYPES`).

        Raises:
            UserError: a tensor is not in its file, or its dtype is not supported.
        """

    @abc.abstractmethod
    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        """Read a tensor in the dtype of its `infos` (ml_dtypes provides bfloat16).

        Args:
            name: the tensor.
            allocate: allocates the result.

        Raises:
            UserError: the file is truncated.
            TransientError: the file cannot be read.
        """

    @abc.abstractmethod
    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor, one slice per axis."""

    @abc.abstractmethod
    def where(self, name: str) -> str:
        """Return the file and the tensor as the subject of an error message."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.infos([name])[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor of weights.

        Raises:
            UserError: it is not a supported floating-point dtype.
        """
        dtype = self.infos([name])[name].dtype
        if dtype not in DTYPES.values():
            raise unsupported(self.where(name), DTYPE_CODES[dtype])
        return dtype


def unsupported(where: str, code: str) -> UserError:
    """Return the error for a tensor whose dtype is not supported.

    Args:
        where: the file and the tensor.
        code: name of the dtype.
    """
    return UserError(
        f"{where} is stored as {code}, which is not supported; "
        f"use weights in {', '.join(sorted(HF_DTYPES.values()))}"
    )


def common_dtype(dtypes: Iterable[np.dtype]) -> np.dtype:
    """Return the dtype that represents the numbers of all, as JAX promotes them."""
    dtypes = list(dtypes)
    wide = np.dtype(np.float64)  # which JAX takes for float32
    return wide if wide in dtypes else np.dtype(jnp.result_type(*dtypes))


def narrowed(dtype: np.dtype) -> np.dtype:
    """Return the dtype in which an array is computed with: float32 for float64."""
    return np.dtype(np.float32) if dtype == np.float64 else dtype


def read_range(path: Path, offset: int, buffer: memoryview, where: str) -> None:
    """Fill a buffer with the bytes of a file from an offset.

    The file is read rather than memory-mapped, because each page of a mapped file causes a page
    fault and stays in memory.

    Args:
        path: the file.
        offset: its first byte to read.
        buffer: filled with bytes.
        where: subject of an error message.

    Raises:
        UserError: the file is truncated.
        TransientError: the file cannot be read.
    """
    try:
        with open_file(path) as file:
            while buffer:
                count = os.preadv(file.fileno(), [buffer], offset)
                if not count:
                    raise UserError(f"{where} is truncated; copy the file again")
                buffer, offset = buffer[count:], offset + count
    except OSError as error:
        raise TransientError(f"{where} cannot be read ({error.strerror})") from None


def allocated(allocate: Allocate, info: TensorInfo, where: str) -> np.ndarray:
    """Return a new array for a tensor.

    Raises:
        UserError: it does not fit in memory.
    """
    try:
        return allocate(info.shape, info.dtype)
    except MemoryError:
        raise UserError(
            f"{where} of shape {info.shape} does not fit in memory; use a machine or a "
            "limit (ulimit -v) with more memory"
        ) from None


def locate_tensors(
    folder: Path, index: str, single: str, open_file: Callable[[str], Mapping[str, T]]
) -> list[T]:
    """Return what the files of a folder say of each tensor: of one file, or of several by an index.

    Args:
        folder: the folder.
        index: name of the index.
        single: name of the only file of a model without an index.
        open_file: returns what a file says of its tensors, by their names.

    Raises:
        UserError: a file is missing or damaged, or does not have the tensors that the index lists.
    """
    path = member(folder, index)
    if not path.exists():
        return list(open_file(single).values())
    weight_map = read_weight_map(path)
    found: dict[str, T] = {}
    for file in sorted(set(weight_map.values())):
        for name, tensor in open_file(file).items():
            if weight_map.get(name) != file:
                raise UserError(
                    f"{folder / file}: {index} does not list the tensor {name!r} in this file; "
                    "copy the folder again"
                )
            found[name] = tensor
    if missing := weight_map.keys() - found.keys():
        name = min(missing)
        raise UserError(
            f"{folder / weight_map[name]}: the tensor {name!r} is not in this file though {index} "
            "lists it; copy the file again"
        )
    return list(found.values())


def read_weight_map(index: Path) -> dict[str, str]:
    """Read the index of weights in several files: tensor name to the name of its file.

    Raises:
        UserError: not an index, or a file is missing.
    """
    fields = read_json_file(index, MAX_INDEX_BYTES, non_finite=True)
    weight_map = fields.get("weight_map") if isinstance(fields, dict) else None
    if not isinstance(weight_map, dict) or not all(
        isinstance(file, str) for file in weight_map.values()
    ):
        raise UserError(f"{index}: not an index of weights (no weight_map); copy the file again")
    for file in sorted(set(weight_map.values())):
        path = member(index.parent, file)
        if not os.path.isfile(path):  # pathlib raises on very long names
            raise UserError(f"{path}: listed in {index.name} but missing; copy the missing file")
    return weight_map
