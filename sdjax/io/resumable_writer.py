"""A checkpoint folder written tensor by tensor, whose interrupted writes can be resumed.

Names, shapes and dtypes are known in advance and determine the file and the offset of each tensor,
so nothing is buffered in memory. A journal in the hidden folder lists the tensors written so far. A
tensor whose file is complete has been flushed to disk; any other counts only until the machine
restarts.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from sdjax.core.files import MAX_INDEX_BYTES
from sdjax.core.json import parse_json
from sdjax.core.storage_errors import storage_errors
from sdjax.io.atomic_write import commit, partial_path, resolve_new_folder
from sdjax.io.links import check_own_folder
from sdjax.io.lock import lock_folder
from sdjax.io.safetensors_writer import (
    assign_files,
    encode_header,
    nbytes,
    raw_bytes,
    write_index,
)

JOURNAL = "journal"
LOCK = "lock"
_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


class ResumableFolder:
    """A checkpoint folder that is being written.

    Attributes:
        folder: the hidden folder; further files may be written into it.
        done: names of the tensors that an earlier attempt has written.
    """

    def __init__(
        self,
        out: Path,
        tensors: Mapping[str, Any],
        *,
        fingerprint: str,
        max_file_bytes: int,
        overwrite: bool = False,
    ):
        """Resume the attempt with the same fingerprint and files, or start from the beginning.

        Args:
            out: the folder, which must not exist, or must be empty unless `overwrite`.
            tensors: name to anything with a shape and a dtype, in the order of the files.
            fingerprint: identifies the content, so that only the same content is resumed.
            max_file_bytes: size limit of a file.
            overwrite: replace a model's folder.

        Raises:
            UserError: `out` is not empty or cannot be written, the disk is full, or another process
                is writing it.
        """
        self.out = resolve_new_folder(out, overwrite=overwrite)
        self._overwrite = overwrite
        self.folder = partial_path(self.out)
        with storage_errors(out):
            check_own_folder(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        self._tensors = tensors
        self._files = assign_files(tensors, max_file_bytes)
        self._file_of = {name: file for file, names in self._files.items() for name in names}
        self._headers = {
            file: encode_header({name: tensors[name] for name in names})
            for file, names in self._files.items()
        }
        self._descriptors: dict[str, int] = {}
        headers = b"".join(header for header, _ in self._headers.values())
        digest = hashlib.sha256(fingerprint.encode() + headers).hexdigest()
        with storage_errors(out):
            self._lock = lock_folder(self.folder, LOCK)
            self._journal = (self.folder / JOURNAL).open("a+", encoding="utf-8", errors="replace")
            self.done = self._resume(digest)
        self._missing = {file: set(names) - self.done for file, names in self._files.items()}

    def write(self, name: str, array: np.ndarray) -> None:
        """Write one tensor of the announced shape and dtype."""
        file = self._file_of[name]
        descriptor = self._descriptor(file)
        _write_at(descriptor, raw_bytes(array), self._headers[file][1][name])
        self._record({"tensor": name, "boot": _boot_id()})
        self._missing[file].discard(name)
        if not self._missing[file]:
            os.fsync(descriptor)
            os.close(self._descriptors.pop(file))
            self._record({"file": file})

    def finish(self) -> None:
        """Rename the folder to its final name, once every tensor has been written."""
        assert not any(self._missing.values()), "tensors are missing"
        write_index(self.folder, self._files, self._tensors)
        (self.folder / JOURNAL).unlink()
        (self.folder / LOCK).unlink()
        commit(self.folder, self.out, overwrite=self._overwrite)
        self.close()

    def discard(self) -> None:
        """Remove the hidden folder, if this attempt is not to be resumed."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Close all files and release the lock; what was written is kept."""
        while self._descriptors:
            os.close(self._descriptors.popitem()[1])
        with contextlib.suppress(OSError):  # a record that could not be written is still buffered
            self._journal.close()
        self._lock.release()

    @property
    def bytes(self) -> int:
        """Total size of the tensors."""
        return sum(map(nbytes, self._tensors.values()))

    def _resume(self, digest: str) -> set[str]:
        """Return the tensors written so far; clear the folder if its content is different."""
        self._journal.seek(0)
        text = self._journal.read(MAX_INDEX_BYTES)
        if text and not text.endswith("\n"):
            print(file=self._journal, flush=True)  # ends the line at which the writer was killed
        records = _parse(text)
        if records[:1] == [{"fingerprint": digest}]:
            return self._written(records[1:])
        for path in self.folder.iterdir():
            if path.name not in (JOURNAL, LOCK):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        self._journal.truncate(0)
        self._record({"fingerprint": digest})
        return set()

    def _written(self, records: list[dict[str, str]]) -> set[str]:
        complete = {record["file"] for record in records if "file" in record}
        written = {name for file in complete for name in self._files.get(file, ())}
        boot = _boot_id()
        for record in records:
            file = self._file_of.get(record.get("tensor", ""))
            if file is not None and record.get("boot") == boot and (self.folder / file).exists():
                written.add(record["tensor"])
        return written

    def _descriptor(self, file: str) -> int:
        if file not in self._descriptors:
            descriptor = os.open(self.folder / file, os.O_RDWR | os.O_CREAT, 0o644)
            _write_at(descriptor, memoryview(self._headers[file][0]), 0)
            self._descriptors[file] = descriptor
        return self._descriptors[file]

    def _record(self, record: dict[str, Any]) -> None:
        print(json.dumps(record), file=self._journal, flush=True)


def _parse(text: str) -> list[dict[str, str]]:
    """Return the records of a journal, without lines that are truncated or not records."""
    records = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            record = parse_json(line)
            if isinstance(record, dict) and all(isinstance(item, str) for item in record.values()):
                records.append(record)
    return records


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count


def _boot_id() -> str:
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""
