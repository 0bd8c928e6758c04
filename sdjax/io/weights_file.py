"""Safetensors files written tensor by tensor, and files that are on disk when the call returns."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
from jax.experimental import multihost_utils

# Safetensors' name of each dtype that a model may have, and Hugging Face's.
DTYPES: dict[str, np.dtype] = {
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F16": np.dtype(np.float16),
    "F32": np.dtype(np.float32),
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
HF_DTYPES = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


def file_parts(tensors: Mapping[str, Any]) -> Iterable[bytes | memoryview]:
    """A safetensors file as its header and then one tensor at a time, never all in memory.

    The format: the length of the header in 8 little-endian bytes, the header in JSON padded with
    spaces to a multiple of 8, the tensors' bytes (https://github.com/huggingface/safetensors).
    Wider types come first, as the reference writer does, so that each tensor is aligned.
    """
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, leaf in ordered:
        start, end = end, end + leaf.nbytes
        header[name] = {
            "dtype": CODES[np.dtype(leaf.dtype)],
            "shape": list(leaf.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for _, leaf in ordered:
        yield np.ascontiguousarray(_on_host(leaf)).view(np.uint8).data


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8 and waits until it is on disk."""
    write_bytes(path, [text.encode()])


def write_bytes(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    """Writes a file piece by piece and waits until it is on disk."""
    with path.open("wb") as file:
        for part in parts:
            file.write(part)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """Makes the names in a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
