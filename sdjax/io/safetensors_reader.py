"""The weights of a model folder, whatever the model: safetensors, one file or a sharded index."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from sdjax.core.errors import TransientError, UserError
from sdjax.io.buffer_pool import Allocate, aligned_empty
from sdjax.io.safetensors_writer import DTYPES, HF_DTYPES, places_in, raw_bytes

# Bytes of a file that may lie in memory beside what was read of it.
PIECE = 2**24

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"


class TensorFolder:
    """A folder's tensors under their own names, checked by the headers and read one by one.

    Attributes:
        folder: where they lie.
        file_of: name to the file that holds the tensor.

    Raises:
        UserError: on construction: no such folder, no safetensors, a damaged index, a file that
            is missing or cut short.
    """

    def __init__(self, folder: str | Path, *, single: str = SINGLE):
        """single: the name of the file where there is no index."""
        self.folder = Path(folder)
        self._single = single
        self._opened: dict[str, Any] = {}
        self._places: dict[str, dict[str, int]] = {}
        self._mapped = 0
        self.file_of = self._locate()

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that are read from."""
        return (self.folder,)

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(sorted(self.file_of))

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.slice(name).get_shape())

    def dtype(self, name: str) -> np.dtype:
        """The dtype in which the tensor is stored. Raises UserError for one not supported."""
        stored = self.slice(name).get_dtype()
        if stored not in DTYPES:
            raise UserError(
                f"{self.where(name)} is stored as {stored}, which is not supported; "
                f"use weights in {', '.join(sorted(HF_DTYPES.values()))}"
            )
        return DTYPES[stored]

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        """The tensor in the dtype it is stored in (bfloat16 as ml_dtypes has it).

        Read rather than mapped: every page of a mapped file costs a fault, and stays in memory.
        allocate: gives the array to read into.
        """
        file = self.file_of[name]
        array = allocate(self.shape(name), self.dtype(name))
        if file not in self._places:
            self._places[file] = places_in(self.folder / file)
        left, place = raw_bytes(array), self._places[file][name]
        try:
            with (self.folder / file).open("rb", buffering=0) as source:
                while left:
                    count = os.preadv(source.fileno(), [left], place)
                    if not count:
                        raise UserError(f"{self.where(name)} is cut short; copy the file again")
                    left, place = left[count:], place + count
        except OSError as error:
            raise TransientError(f"{self.where(name)} cannot be read ({error.strerror})") from None
        return array

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, one slice an axis, in the dtype it is stored in.

        Files are mapped into memory, where what was read once stays until they are closed. So the
        rows are read in pieces, and all files are closed every `PIECE` bytes.
        """
        shape, dtype = self.shape(name), self.dtype(name)
        bounds = [part.indices(size)[:2] for part, size in zip(box, shape, strict=True)]
        part = np.empty([stop - start for start, stop in bounds], dtype)
        # Of a part of the columns, the pages of whole rows are mapped.
        row = dtype.itemsize * math.prod(shape[1:])
        rows = max(1, PIECE // max(1, row))
        (first, last), columns = bounds[0], tuple(slice(*pair) for pair in bounds[1:])
        for start in range(first, last, rows):
            stop = min(start + rows, last)
            self._mapped += (stop - start) * row
            if self._mapped > PIECE:
                self._opened.clear()
                self._mapped = (stop - start) * row
            part[start - first : stop - first] = self.slice(name)[slice(start, stop), *columns]
        return part

    def slice(self, name: str) -> Any:
        """safetensors' view of a tensor, of which parts can be read."""
        try:
            return self.open(self.file_of[name]).get_slice(name)
        except SafetensorError:
            raise UserError(
                f"{self.where(name)} is not in this file though {INDEX} says so; "
                "copy the file again"
            ) from None

    def where(self, name: str) -> str:
        """The file and the tensor, as the beginning of a sentence."""
        return f"{self.folder / self.file_of[name]}: the tensor {name!r}"

    def open(self, file: str) -> Any:
        """One file, opened once."""
        if file not in self._opened:
            path = self.folder / file
            try:
                self._opened[file] = safe_open(path, framework="numpy")
            except FileNotFoundError:
                raise UserError(
                    f"{path}: listed in {INDEX} but not there; copy the missing file"
                ) from None
            except (SafetensorError, OSError) as error:
                raise UserError(
                    f"{path}: cut short or not a safetensors file ({error}); copy the file again"
                ) from None
        return self._opened[file]

    def _locate(self) -> dict[str, str]:
        """Tensor name to the file that holds it."""
        index = self.folder / INDEX
        if index.exists():
            try:
                weight_map = dict(json.loads(index.read_text())["weight_map"])
                if not all(isinstance(file, str) for file in weight_map.values()):
                    raise TypeError
            except (ValueError, KeyError, TypeError, RecursionError):
                raise UserError(
                    f"{index}: not a safetensors index (no weight_map); copy the file again"
                ) from None
            for file in sorted(set(weight_map.values())):
                for name in list(self.open(file).keys()):
                    if weight_map.get(name) != file:
                        raise UserError(
                            f"{self.folder / file}: the tensor {name!r} is not listed there by "
                            f"{INDEX}; copy the folder again"
                        )
            return weight_map
        if not (self.folder / self._single).exists():
            pickles = sorted(self.folder.glob("*.bin")) + sorted(self.folder.glob("*.pt"))
            if pickles:
                raise UserError(
                    f"{self.folder}: only pickle weights ({pickles[0].name}), which can run code "
                    "and are not read; convert them with transformers' save_pretrained"
                )
            raise UserError(
                f"{self.folder}: no weights; expected {self._single} or {INDEX} beside {CONFIG}"
            )
        return dict.fromkeys(self.open(self._single).keys(), self._single)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; an absent file is an empty one. Raises UserError for anything else."""
    if not path.is_file():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None
    return fields
