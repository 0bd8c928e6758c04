"""Reader of the weights in a GGUF file, dequantized and under Hugging Face's names."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.gguf_file import GgufTensor, read_gguf_header
from sdjax.io.gguf_names import (
    ARCHITECTURES,
    ROPE_TENSORS,
    gguf_config,
    hf_name,
    is_shifted,
    stored_rows,
)
from sdjax.io.links import member
from sdjax.io.safetensors_writer import raw_bytes
from sdjax.io.tensor_reader import (
    MAX_BLOCK_BYTES,
    TensorInfo,
    TensorReader,
    allocated,
    read_range,
)
from sdjax.xla.alignment import Allocate, aligned_empty

_PART = re.compile(r"(.+)-[0-9]{5}-of-([0-9]{5})\.gguf")


class GgufReader(TensorReader):
    """Reader of a GGUF file, or of one that is split into several."""

    def __init__(self, folder: Path):
        """Open the GGUF file of a folder.

        Raises:
            UserError: several models, a damaged file, or an architecture, element type or tensor
                that is not supported.
        """
        self.folder = folder
        self._files: dict[str, str] = {}
        self._tensors: dict[str, GgufTensor] = {}
        self._order: dict[str, np.ndarray | None] = {}
        self._settings: dict[str, Any] = {}
        self._has_rope_tensors = False
        files = gguf_files(folder)
        self._path = folder / files[0]
        for file in files:
            settings, tensors = read_gguf_header(member(folder, file))
            self._settings = settings | self._settings
            self._add(file, tensors)
        self._infos = {
            name: TensorInfo(tensor.shape, tensor.type.dtype)
            for name, tensor in self._tensors.items()
        }

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self._infos))

    @property
    def notes(self) -> tuple[str, ...]:
        """Say how many tensors are dequantized."""
        quantized = [t.type.name for t in self._tensors.values() if t.type.decode is not None]
        types = ", ".join(name for name, _ in Counter(quantized).most_common())
        count = len(quantized)
        return (
            f"{count} tensor{'s' * (count > 1)} of {self._path.name} in {types}: dequantized to "
            "float32",
        ) * bool(quantized)

    @property
    def config(self) -> dict[str, Any]:
        """Fields of a config.json, from the file's settings.

        Raises:
            UserError: they are not complete.
        """
        embedding = self._infos.get("model.embed_tokens.weight")
        try:
            if embedding is None:
                raise ValueError("it has no token embedding")
            if self._has_rope_tensors:
                raise ValueError("the rotary embedding is scaled")
            return gguf_config(
                self._settings,
                vocab_size=embedding.shape[0],
                tied="lm_head.weight" not in self._infos,
            )
        except ValueError as error:
            raise UserError(
                f"{self._path}: its settings cannot replace config.json ({error}); copy the "
                "original model's config.json next to it"
            ) from None

    def infos(self, names: Iterable[str]) -> Mapping[str, TensorInfo]:
        """Return the shape and dtype of all tensors."""
        return self._infos

    def where(self, name: str) -> str:
        """Return the file and the tensor as the subject of an error message."""
        return f"{self.folder / self._files[name]}: the tensor {name!r}"

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        """Read a tensor, dequantized."""
        array = allocated(allocate, self._infos[name], self.where(name))
        self._fill(array, name, (slice(None),) * array.ndim)
        return array

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor, one slice per axis."""
        info = self._infos[name]
        bounds = [part.indices(size)[:2] for part, size in zip(box, info.shape, strict=True)]
        array = np.empty([max(stop - start, 0) for start, stop in bounds], info.dtype)
        self._fill(array, name, tuple(slice(*pair) for pair in bounds))
        return array

    def _fill(self, array: np.ndarray, name: str, box: tuple[slice, ...]) -> None:
        """Fill an array with a part of a tensor, in blocks of rows of the first axis."""
        shape, order = self._infos[name].shape, self._order[name]
        if len(shape) == 1:
            array[...] = self._rows(name, 0, 1)[0][box[0]]
            return
        rows = np.arange(shape[0])[box[0]]
        rows = rows if order is None else order[rows]
        inner = math.prod(shape[1:-1])  # rows of the file for each of the first axis
        size = max(1, MAX_BLOCK_BYTES // max(1, 4 * math.prod(shape[1:])))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            first, last = int(part.min()), int(part.max()) + 1
            values = self._rows(name, first * inner, (last - first) * inner)
            values = values.reshape(last - first, *shape[1:])[part - first]
            array[start : start + size] = values[:, *box[1:]]

    @np.errstate(over="ignore", invalid="ignore")  # callers check the result
    def _rows(self, name: str, first: int, count: int) -> np.ndarray:
        """Read rows along the last axis and return them as [count, size of the last axis]."""
        tensor = self._tensors[name]
        stored = np.empty((count, tensor.row_bytes), np.uint8)
        offset = tensor.offset + first * tensor.row_bytes
        read_range(
            member(self.folder, self._files[name]), offset, raw_bytes(stored), self.where(name)
        )
        if tensor.type.decode is None:
            values = stored.view(tensor.type.dtype)
        else:
            values = tensor.type.decode(stored.reshape(-1, tensor.type.bytes))
        values = values.reshape(count, tensor.shape[-1])
        if is_shifted(name, self._settings["general.architecture"]):
            values = values - np.asarray(1, values.dtype)
        return values

    def _add(self, file: str, tensors: Mapping[str, GgufTensor]) -> None:
        architecture = self._settings.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
            raise UserError(
                f"{self.folder / file}: GGUF files of {truncated_repr(architecture)} are not "
                f"supported; use one of {', '.join(ARCHITECTURES)}, or the original model"
            )
        for stored, tensor in tensors.items():
            if stored in ROPE_TENSORS:
                self._has_rope_tensors = True
                continue
            name = hf_name(stored, architecture)
            if name is None or name in self._tensors:
                problem = "is not known in" if name is None else "is twice in"
                raise UserError(
                    f"{self.folder / file}: the tensor {truncated_repr(stored)} {problem} a model "
                    f"of {architecture}; use the original model"
                )
            try:
                self._order[name] = stored_rows(name, architecture, self._settings, tensor.shape[0])
            except ValueError as error:
                raise UserError(f"{self.folder / file}: {error}; copy the file again") from None
            self._tensors[name], self._files[name] = tensor, file


def gguf_files(folder: Path) -> list[str]:
    """Return the GGUF file of a folder, or the parts of one.

    Raises:
        UserError: there are several models, or a part is missing.
    """
    files = sorted(path.name for path in folder.glob("*.gguf"))
    parts = {(match[1], match[2]) for file in files if (match := _PART.fullmatch(file))}
    if len(parts) == 1 and all(map(_PART.fullmatch, files)):
        ((_, count),) = parts
        if len(files) != int(count):
            raise UserError(f"{folder}: has {len(files)} of {int(count)} parts of a GGUF file")
    elif len(files) > 1:
        raise UserError(
            f"{folder}: has several GGUF models ({files[0]}, {files[1]}); move the one to read "
            "into a folder of its own"
        )
    return files
