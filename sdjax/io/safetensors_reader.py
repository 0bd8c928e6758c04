"""Reader of the weights of any checkpoint folder: safetensors, one file or a sharded index."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError
from sdjax.core.files import MAX_TEXT_BYTES, read_json_file
from sdjax.io.links import member
from sdjax.io.safetensors_writer import (
    INDEX,
    SINGLE,
    STORED_DTYPES,
    HeaderEntry,
    read_header,
)
from sdjax.io.stored_reader import StoredReader
from sdjax.io.tensor_reader import TensorInfo, check_listed, read_weight_map

CONFIG = "config.json"


class SafetensorsReader(StoredReader):
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
        self._headers: dict[str, dict[str, HeaderEntry]] = {}
        self._infos: dict[str, TensorInfo] = {}
        self.file_of = self._locate()

    @property
    def names(self) -> tuple[str, ...]:
        """All tensor names, sorted."""
        return tuple(sorted(self.file_of))

    def infos(self, names: Iterable[str]) -> dict[str, TensorInfo]:
        """Return the shape, dtype and offset of at least these tensors, from the files' headers.

        The dtype may be that of a buffer (`STORED_DTYPES`).

        Raises:
            UserError: a tensor is not in its file, or its dtype is not supported.
        """
        for name in names:
            if name in self._infos:
                continue
            header = self._headers[self.file_of[name]]
            if name not in header:
                raise UserError(
                    f"{self.where(name)} is not in this file though {INDEX} lists it; copy the "
                    "file again"
                )
            shape, code, offset = header[name]
            if code not in STORED_DTYPES:
                raise self.unsupported(name, code)
            self._infos[name] = TensorInfo(shape, STORED_DTYPES[code], offset)
        return self._infos

    def path(self, name: str) -> Path:
        """Return the file of a tensor."""
        return member(self.folder, self.file_of[name])

    def _locate(self) -> dict[str, str]:
        """Read the headers of all files and return the file of each tensor."""
        index = member(self.folder, INDEX)
        if not index.exists():
            self._headers[self._single] = read_header(member(self.folder, self._single))
            return dict.fromkeys(self._headers[self._single], self._single)
        weight_map = read_weight_map(index)
        for file in sorted(set(weight_map.values())):
            self._headers[file] = read_header(member(self.folder, file))
            check_listed(index, weight_map, file, self._headers[file])
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
