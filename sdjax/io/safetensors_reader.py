"""Reader of the weights of any checkpoint folder: safetensors, one file or a sharded index."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import SafetensorError, safe_open

from sdjax.core.errors import TransientError, UserError
from sdjax.core.files import MAX_INDEX_BYTES, MAX_TEXT_BYTES, read_json_file
from sdjax.io.links import member
from sdjax.io.safetensors_writer import (
    DTYPE_CODES,
    DTYPES,
    HF_DTYPES,
    INDEX,
    SINGLE,
    STORED_DTYPES,
    HeaderEntry,
    check_header_size,
    not_safetensors,
    raw_bytes,
    read_header,
)
from sdjax.xla.alignment import Allocate, aligned_empty

CONFIG = "config.json"
# Bytes of memory-mapped files that may be resident in addition to the tensors read.
MAX_MAPPED_BYTES = 2**24


class TensorInfo(NamedTuple):
    """A tensor in a file: its shape, its dtype and the offset of its first byte."""

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int


class SafetensorsReader:
    """Reader of a folder's tensors, one at a time, by their names in the files.

    Attributes:
        folder: the folder of the files.
        file_of: tensor name to the name of its file.
    """

    def __init__(self, folder: str | Path, *, single: str = SINGLE):
        """Open a folder and check its index.

        Args:
            folder: a checkpoint folder.
            single: name of the file if there is no index.

        Raises:
            UserError: no such folder, no safetensors, a damaged index, a missing or truncated file,
                or one that is not in the folder.
        """
        self.folder = Path(folder)
        self._single = single
        self._open_files: dict[str, Any] = {}
        self._headers: dict[str, dict[str, HeaderEntry]] = {}
        self._infos: dict[str, TensorInfo] = {}
        self._mapped_bytes = 0
        self.file_of = self._locate()

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that are read."""
        return (self.folder,)

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self.file_of))

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor."""
        return self.infos([name])[name].shape

    def dtype(self, name: str) -> np.dtype:
        """Return the stored dtype of a tensor of weights.

        Raises:
            UserError: it is not a supported floating-point dtype.
        """
        dtype = self.infos([name])[name].dtype
        if dtype not in DTYPES.values():
            raise self._unsupported(name, DTYPE_CODES[dtype])
        return dtype

    def infos(self, names: Iterable[str]) -> dict[str, TensorInfo]:
        """Return the shape, dtype and offset of at least these tensors, from the files' headers.

        The dtype may be that of a buffer (`STORED_DTYPES`).

        Raises:
            UserError: a tensor is not in its file, or its dtype is not supported.
        """
        for name in names:
            if name in self._infos:
                continue
            file = self.file_of[name]
            if file not in self._headers:
                self._headers[file] = read_header(member(self.folder, file))
            if name not in self._headers[file]:
                raise self._not_in_file(name)
            shape, code, offset = self._headers[file][name]
            if code not in STORED_DTYPES:
                raise self._unsupported(name, code)
            self._infos[name] = TensorInfo(shape, STORED_DTYPES[code], offset)
        return self._infos

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        """Read a tensor in its stored dtype (ml_dtypes provides bfloat16).

        The file is read rather than memory-mapped, because each page of a mapped file causes a page
        fault and stays in memory.

        Args:
            name: the tensor.
            allocate: allocates the result.

        Raises:
            UserError: the file is truncated.
            TransientError: the file cannot be read.
        """
        infos = self._infos if name in self._infos else self.infos([name])
        shape, dtype, offset = infos[name]
        try:
            array = allocate(shape, dtype)
        except MemoryError:
            raise UserError(
                f"{self.where(name)} of shape {shape} does not fit in memory; use a machine or a "
                "limit (ulimit -v) with more memory"
            ) from None
        remaining = raw_bytes(array)
        try:
            path = member(self.folder, self.file_of[name])
            with path.open("rb", buffering=0) as source:
                while remaining:
                    count = os.preadv(source.fileno(), [remaining], offset)
                    if not count:
                        raise UserError(f"{self.where(name)} is truncated; copy the file again")
                    remaining, offset = remaining[count:], offset + count
        except OSError as error:
            raise TransientError(f"{self.where(name)} cannot be read ({error.strerror})") from None
        return array

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor, one slice per axis, in its stored dtype.

        Pages of a memory-mapped file stay resident until it is closed. The rows are therefore read
        in blocks, and all files are closed every `MAX_MAPPED_BYTES`.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        bounds = [part.indices(size)[:2] for part, size in zip(box, shape, strict=True)]
        result = np.empty([stop - start for start, stop in bounds], dtype)
        row_bytes = dtype.itemsize * math.prod(shape[1:])  # whole rows are mapped
        rows = max(1, MAX_MAPPED_BYTES // max(1, row_bytes))
        (first, last), columns = bounds[0], tuple(slice(*pair) for pair in bounds[1:])
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            self._mapped_bytes += (stop - start) * row_bytes
            if self._mapped_bytes > MAX_MAPPED_BYTES:
                self._open_files.clear()
                self._mapped_bytes = (stop - start) * row_bytes
            block = self.slice(name)[slice(start, stop), *columns]
            result[start - first : stop - first] = block
        return result

    def slice(self, name: str) -> Any:
        """Return the lazy slice of a tensor from safetensors."""
        try:
            return self.open(self.file_of[name]).get_slice(name)
        except SafetensorError:
            raise self._not_in_file(name) from None

    def _unsupported(self, name: str, code: str) -> UserError:
        return UserError(
            f"{self.where(name)} is stored as {code}, which is not supported; "
            f"use weights in {', '.join(sorted(HF_DTYPES.values()))}"
        )

    def _not_in_file(self, name: str) -> UserError:
        return UserError(
            f"{self.where(name)} is not in this file though {INDEX} lists it; copy the file again"
        )

    def where(self, name: str) -> str:
        """Return the file and the tensor as the subject of an error message."""
        return f"{self.folder / self.file_of[name]}: the tensor {name!r}"

    def open(self, file: str) -> Any:
        """Open a file, or return it if it is open."""
        if file not in self._open_files:
            path = member(self.folder, file)
            if not path.exists():
                raise UserError(f"{path}: listed in {INDEX} but missing; copy the missing file")
            check_header_size(path)
            try:
                self._open_files[file] = safe_open(path, framework="numpy")
            except MemoryError:
                raise UserError(
                    f"{path}: {path.stat().st_size:,} bytes cannot be mapped into memory; raise "
                    "the limit of the address space (ulimit -v), or use a smaller file"
                ) from None
            except (SafetensorError, OSError) as error:
                raise not_safetensors(path, error) from None
        return self._open_files[file]

    def _locate(self) -> dict[str, str]:
        """Return the file of each tensor."""
        index = member(self.folder, INDEX)
        if index.exists():
            return self._read_index(index)
        if not member(self.folder, self._single).exists():
            pickles = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt"))
            if pickles:
                raise UserError(
                    f"{self.folder}: only pickle weights ({pickles[0].name}), which can run code "
                    "and are not read; convert them with transformers' save_pretrained"
                )
            raise UserError(
                f"{self.folder}: no weights; {self._single} or {INDEX} must be next to {CONFIG}"
            )
        return dict.fromkeys(self.open(self._single).keys(), self._single)

    def _read_index(self, index: Path) -> dict[str, str]:
        weight_map = read_json(index, MAX_INDEX_BYTES).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(file, str) for file in weight_map.values()
        ):
            raise UserError(
                f"{index}: not a safetensors index (no weight_map); copy the file again"
            )
        for file in sorted(set(weight_map.values())):
            for name in list(self.open(file).keys()):
                if weight_map.get(name) != file:
                    raise UserError(
                        f"{self.folder / file}: {INDEX} does not list the tensor {name!r} in this "
                        "file; copy the folder again"
                    )
        return weight_map


def read_json(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> dict[str, Any]:
    """Read the JSON object of a file in a model's folder; a missing file is an empty object.

    NaN and Infinity, which the config.json of some models contains, are accepted.

    Args:
        path: the file.
        max_bytes: size limit.

    Raises:
        UserError: the file is not a JSON object, is larger, or is a link that leads out of its
            folder.
    """
    path = member(path.parent, path.name)
    if not path.is_file():
        return {}
    fields = read_json_file(path, max_bytes, non_finite=True)
    if not isinstance(fields, dict):
        raise UserError(f"{path}: not valid JSON (not an object); copy the file again")
    return fields
