"""Reader of weights in 8-bit floats with scales, as those of DeepSeek-V3 and Qwen3-FP8.

A weight is its 8-bit float times the scale of its block, row or tensor, computed in float32 and
rounded once to the dtype that the config gives the model.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.quantization import block_size
from sdjax.io.safetensors_writer import DTYPES, FLOAT8_DTYPES, HF_DTYPES
from sdjax.io.tensor_reader import MAX_BLOCK_BYTES, TensorInfo, TensorReader, allocated
from sdjax.xla.alignment import Allocate, aligned_empty

_DEFAULT_BLOCK = (128, 128)
# Scales of weights: both are factors, also the one that is called an inverse.
_SCALES = ("_scale_inv", "_scale")
# Scales of activations, which weights do not need.
_ACTIVATIONS = re.compile(r"(.*\.)?((input|output|activation|[kvq])_scale|input_scale_ub)")


class Float8Reader(TensorReader):
    """Reader of another reader's tensors, with 8-bit floats as wider ones."""

    def __init__(self, stored: TensorReader, config: Mapping[str, Any]):
        """Find the scales.

        Args:
            stored: reads the 8-bit floats and their scales.
            config: content of the model's config.json.

        Raises:
            UserError: a scale does not fit its weights.
        """
        self.folder = stored.folder
        self._stored = stored
        self._dtype = _model_dtype(config)
        infos = stored.infos(stored.names)
        narrow = [n for n in stored.names if infos[n].dtype in FLOAT8_DTYPES.values()]
        self._scale_of: dict[str, str | None] = {}
        self._blocks: dict[str, tuple[int, int]] = {}
        for name in narrow:
            scale = next((name + end for end in _SCALES if name + end in infos), None)
            self._scale_of[name] = scale
            if scale is not None:
                self._blocks[name] = self._block(name, scale, block_size(config))
        hidden = set(self._scale_of.values())
        self._infos = {
            name: info._replace(dtype=self._dtype) if name in self._scale_of else info
            for name, info in infos.items()
            if name not in hidden and not _ACTIVATIONS.fullmatch(name)
        }

    @property
    def folders(self) -> tuple[Path, ...]:
        """All folders that are read."""
        return self._stored.folders

    @property
    def notes(self) -> tuple[str, ...]:
        """Say how many tensors are dequantized."""
        count = len(self._scale_of)
        return (
            *self._stored.notes,
            f"{count} tensor{'s' * (count > 1)} stored as 8-bit floats: dequantized to "
            f"{self._dtype.name}",
        )

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names except those of scales, sorted."""
        return tuple(sorted(self._infos))

    def infos(self, names: Iterable[str]) -> Mapping[str, TensorInfo]:
        """Return the shape and dtype of all tensors."""
        return self._infos

    def where(self, name: str) -> str:
        """Return the file and the tensor as the subject of an error message."""
        return self._stored.where(name)

    def read(self, name: str, allocate: Allocate = aligned_empty) -> np.ndarray:
        """Read a tensor, dequantized if it is stored as 8-bit floats."""
        if name not in self._scale_of:
            return self._stored.read(name, allocate)
        array = allocated(allocate, self._infos[name], self.where(name))
        self._dequantize(self._stored.read(name), name, (0,) * array.ndim, array)
        return array

    def read_box(self, name: str, box: tuple[slice, ...]) -> np.ndarray:
        """Read a part of a tensor, one slice per axis."""
        narrow = self._stored.read_box(name, box)
        if name not in self._scale_of:
            return narrow
        array = np.empty(narrow.shape, self._dtype)
        sizes = self._infos[name].shape
        starts = tuple(part.indices(size)[0] for part, size in zip(box, sizes, strict=True))
        self._dequantize(narrow, name, starts, array)
        return array

    @np.errstate(over="ignore", invalid="ignore")  # callers check the result
    def _dequantize(
        self, narrow: np.ndarray, name: str, starts: tuple[int, ...], array: np.ndarray
    ) -> None:
        """Fill an array with a part of a tensor that begins at `starts`."""
        scale_name = self._scale_of[name]
        if scale_name is None:
            array[...] = narrow.astype(np.float32).astype(array.dtype)
            return
        scales = self._stored.read(scale_name).astype(np.float32)
        if scales.size == 1:
            scales = scales.reshape((1,) * array.ndim)
        elif scales.ndim < array.ndim:  # one per row
            scales = scales.reshape(*scales.shape, 1)
        blocks = (1,) * (array.ndim - 2) + self._blocks[name]
        indices = [
            np.minimum(np.arange(start, start + size) // block, count - 1)
            for start, size, block, count in zip(
                starts, array.shape, blocks, scales.shape, strict=True
            )
        ]
        rows = max(1, MAX_BLOCK_BYTES // max(1, 4 * array[:1].size))
        for first in range(0, len(array), rows):
            part = slice(first, first + rows)
            factors = scales[np.ix_(indices[0][part], *indices[1:])]
            array[part] = (narrow[part].astype(np.float32) * factors).astype(array.dtype)

    def _block(self, name: str, scale: str, declared: tuple[int, int] | None) -> tuple[int, int]:
        """Return the number of rows and of columns that share a scale."""
        infos = self._stored.infos([name, scale])
        shape, scales, dtype = infos[name].shape, infos[scale].shape, infos[scale].dtype
        if dtype in DTYPES.values() and len(shape) >= 2:
            *lead, rows, columns = shape
            if all(size == 1 for size in scales):
                return max(rows, 1), max(columns, 1)
            if scales == (*lead, rows):
                return 1, max(columns, 1)
            per_row = scales[-1] if scales else 0
            by_group = (1, columns // per_row) if per_row and columns % per_row == 0 else None
            for block in (declared, by_group, _DEFAULT_BLOCK):
                if (
                    block is not None
                    and all(block)
                    and scales
                    == (
                        *lead,
                        -(-rows // block[0]),
                        -(-columns // block[1]),
                    )
                ):
                    return block
        raise UserError(
            f"{self.where(scale)} is {dtype.name} of shape {list(scales)}, which does not fit the "
            f"8-bit floats {name} of shape {list(shape)}; use the model that was quantized"
        )


def _model_dtype(config: Mapping[str, Any]) -> np.dtype:
    """Return the dtype that a config.json gives the weights; bfloat16 by default."""
    codes = {name: code for code, name in HF_DTYPES.items()}
    for section in (config, config.get("text_config")):
        for key in ("dtype", "torch_dtype"):
            name = section.get(key) if isinstance(section, Mapping) else None
            if isinstance(name, str) and name in codes:
                return DTYPES[codes[name]]
    return DTYPES["BF16"]
