"""Files that `torch.save` writes: where the elements of each tensor are, without PyTorch.

Since version 1.6 such a file is a zip archive with a pickle and one uncompressed entry per storage.
Before, it was a sequence of pickles followed by the storages.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from sdjax.core.errors import UserError
from sdjax.core.files import open_file
from sdjax.io.torch_pickle import (
    MAX_PICKLE_BYTES,
    PickleError,
    Storage,
    StoredTensor,
    load_pickle,
    tensors_of,
)

MAX_DIRECTORY_BYTES = 16_000_000  # of a zip archive, about 100 bytes per tensor
_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001
_LOCAL_HEADER_BYTES = 30


def read_torch_file(path: Path) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    """Return the tensors of a file by name, and the first byte of each storage by its key.

    All elements are within the file.

    Raises:
        UserError: not a file of `torch.save`, a damaged one, or one with anything but tensors.
    """
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            is_zip = file.read(4) == b"PK\x03\x04"
            tensors, offsets = (_read_zip if is_zip else _read_legacy)(file, size)
    except PickleError as error:
        raise UserError(
            f"{path}: not read, since it contains {error}; use weights in safetensors, or a file "
            "with nothing but the tensors of one model"
        ) from None
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError) as error:
        raise UserError(
            f"{path}: truncated or not a file of PyTorch weights ({error}); copy the file again"
        ) from None
    return tensors, offsets


class _BoundedReads:
    """A file for `zipfile`, which reads the whole directory of an archive at once."""

    def __init__(self, file: IO[bytes]):
        self._file = file
        self.seek, self.tell, self.seekable = file.seek, file.tell, file.seekable

    def read(self, count: int = -1) -> bytes:
        if count > MAX_DIRECTORY_BYTES:
            raise ValueError(f"a directory of {count:,} bytes")
        content = self._file.read(MAX_DIRECTORY_BYTES if count < 0 else count)
        if count < 0 and self._file.read(1):
            raise ValueError("a directory without an end")
        return content


def _read_zip(file: IO[bytes], size: int) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    with zipfile.ZipFile(_BoundedReads(file)) as archive:
        entries = {entry.filename: entry for entry in archive.infolist()}
        if len(entries) != len(archive.infolist()):
            raise ValueError("two entries of the same name")
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise ValueError("no data.pkl in the archive")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise PickleError("TorchScript, which is a program")
    content = _read_entry(file, entries[pickles[0]], size)
    if f"{root}byteorder" in entries:
        order = _read_entry(file, entries[f"{root}byteorder"], size)
        if order != b"little":
            raise ValueError("byte order other than little")
    value, _ = load_pickle(content)
    tensors = tensors_of(value)
    offsets = {}
    for storage in _storages(tensors).values():
        name = f"{root}data/{storage.key}"
        if name not in entries:
            raise ValueError(f"no entry {name!r}")
        offsets[storage.key] = _entry_offset(file, entries[name], size)
        if entries[name].file_size < storage.size * storage.dtype.itemsize:
            raise ValueError(f"the entry {name!r} is shorter than its tensors")
    return tensors, offsets


def _entry_offset(file: IO[bytes], entry: zipfile.ZipInfo, size: int) -> int:
    """Return the first byte of the content of an entry, which is stored as it is."""
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise ValueError(f"the entry {entry.filename!r} is compressed")
    file.seek(entry.header_offset)
    header = file.read(_LOCAL_HEADER_BYTES)
    if len(header) < _LOCAL_HEADER_BYTES or header[:4] != b"PK\x03\x04":
        raise ValueError(f"the entry {entry.filename!r} has no header")
    name_bytes, extra_bytes = (int.from_bytes(header[i : i + 2], "little") for i in (26, 28))
    offset = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
    if offset + entry.file_size > size:
        raise ValueError(f"the entry {entry.filename!r} is not within the file")
    return offset


def _read_entry(file: IO[bytes], entry: zipfile.ZipInfo, size: int) -> bytes:
    if entry.file_size > MAX_PICKLE_BYTES:
        raise PickleError(f"a pickle of {entry.file_size:,} bytes")
    file.seek(_entry_offset(file, entry, size))
    return file.read(entry.file_size)


def _read_legacy(file: IO[bytes], size: int) -> tuple[dict[str, StoredTensor], dict[str, int]]:
    file.seek(0)
    content = file.read(MAX_PICKLE_BYTES)
    if content[:1] != b"\x80":
        raise ValueError("neither a zip archive nor a pickle")
    values: list[Any] = []
    position = 0
    for _ in range(5):  # magic number, protocol, system, tensors, keys of the storages
        value, position = load_pickle(content, position)
        values.append(value)
        if values[0] != _LEGACY_MAGIC:
            raise ValueError("a pickle that torch.save did not write")
    _, protocol, system, value, keys = values
    if protocol != _LEGACY_PROTOCOL or not isinstance(system, dict):
        raise ValueError("an unknown version")
    if system.get("little_endian") is not True:
        raise ValueError("byte order other than little")
    tensors = tensors_of(value)
    storages = _storages(tensors)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise ValueError("no list of storages")
    offsets = {}
    for key in keys:
        if key not in storages:
            raise ValueError("a storage of unknown size")
        storage = storages[key]
        file.seek(position)
        count = int.from_bytes(file.read(8), "little")
        offsets[key] = position + 8
        position = offsets[key] + count * storage.dtype.itemsize
        if count < storage.size or position > size:
            raise ValueError("a storage is not within the file")
    if missing := storages.keys() - offsets.keys():
        raise ValueError(f"no storage {min(missing)!r}")
    return tensors, offsets


def _storages(tensors: Mapping[str, StoredTensor]) -> dict[str, Storage]:
    """Return the storages of tensors by key."""
    storages: dict[str, Storage] = {}
    for tensor in tensors.values():
        storage = tensor.storage
        if storages.setdefault(storage.key, storage) != storage:
            raise ValueError(f"two storages {storage.key!r}")
    return storages
