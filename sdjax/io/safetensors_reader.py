"""Reader of the weights of any checkpoint folder: safetensors, one file or a sharded index."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.core.errors import UserError
from sdjax.core.files import MAX_TEXT_BYTES, read_json_file
from sdjax.io.links import member
from sdjax.io.safetensors_writer import INDEX, SINGLE, STORED_DTYPES, read_header
from sdjax.io.stored_reader import Place, StoredReader, row_major
from sdjax.io.tensor_reader import TensorInfo, locate_tensors, unsupported

CONFIG = "config.json"


class SafetensorsReader(StoredReader):
    """Reader of a folder's tensors in safetensors, one file or a sharded index."""

    def __init__(self, folder: str | Path, *, single: str = SINGLE):
        """Open a folder, and check its index and the headers of all files.

        Args:
            folder: a checkpoint folder.
            single: name of the only file of a model without an index.

        Raises:
            UserError: no such folder, no safetensors, a damaged index, a missing or truncated file,
                one that is not in the folder, or a tensor of an unsupported dtype.
        """
        folder = Path(folder)

        def open_file(file: str) -> dict[str, Place]:
            return {place.name: place for place in _places(member(folder, file))}

        super().__init__(folder, locate_tensors(folder, INDEX, single, open_file))


def _places(path: Path) -> Iterator[Place]:
    """Yield the places of the tensors in a file."""
    for name, (shape, code, offset) in read_header(path).items():
        info = TensorInfo(shape, STORED_DTYPES.get(code, np.dtype(np.void)))
        place = Place(name=name, path=path, offset=offset, info=info, strides=row_major(shape))
        if code not in STORED_DTYPES:
            raise unsupported(place.where, code)
        yield place


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
