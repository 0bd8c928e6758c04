"""Digest of stored weights, by which what was computed of them is recognized."""

from __future__ import annotations

import hashlib
from pathlib import Path

from sdjax.io.tensor_reader import TensorReader
from sdjax.io.weights import open_adapter_weights, open_model_weights

_MAX_ELEMENTS = 4_096  # that are read of each tensor
_DIGITS = 32


def weights_digest(folder: Path, adapter: Path | None = None) -> str:
    """Return a hexadecimal digest of the names, shapes, dtypes and middle rows of all tensors.

    Reading a row per tensor takes milliseconds, and training changes every tensor that it trains.
    Copies of a model have equal digests, also if its tensors are spread over other files.

    Args:
        folder: folder of the model.
        adapter: folder of its adapter.

    Raises:
        UserError: no weights, or damaged ones.
    """
    digest = hashlib.sha256()
    _update(digest, open_model_weights(folder))
    if adapter is not None:
        _update(digest, open_adapter_weights(adapter))
    return digest.hexdigest()[:_DIGITS]


def _update(digest: hashlib._Hash, reader: TensorReader) -> None:
    infos = reader.infos(reader.names)
    for name in reader.names:
        shape, dtype = infos[name].shape, infos[name].dtype
        digest.update(repr((name, tuple(shape), dtype.name)).encode())
        middle = [slice(size // 2, size // 2 + 1) for size in shape[:-1]]
        box = (*middle, *(slice(0, _MAX_ELEMENTS) for _ in shape[-1:]))
        digest.update(reader.read_box(name, box).tobytes())
