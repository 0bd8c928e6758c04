"""Weights written tensor by tensor into a folder that appears when it is whole.

Everything about the files is known before the first tensor: names, shapes and dtypes give each
tensor its file and its place in it, so nothing is held back in memory. A journal says what is
written. Whoever is interrupted finds the hidden folder again and goes on behind the last tensor;
what was not yet forced to disk counts only until the machine restarts.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from sdjax.core.errors import UserError
from sdjax.io.lock import locked
from sdjax.io.safetensors_reader import INDEX, SINGLE
from sdjax.io.safetensors_writer import file_header, raw_bytes, sync_folder, write_text

JOURNAL = "journal"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # what making room mends
_BOOT = Path("/proc/sys/kernel/random/boot_id")


class ResumableFolder:
    """A model folder in the making.

    Attributes:
        folder: the hidden folder; further files may be put there.
        done: the names that an earlier attempt has written.
    """

    def __init__(
        self, out: Path, tensors: Mapping[str, Any], *, fingerprint: str, max_file_bytes: int
    ):
        """Takes up what an attempt of the same fingerprint and files has left, else begins anew.

        tensors: name to anything with a shape and a dtype, in the order of the files.
        Raises UserError where ``out`` holds something, no folder can take its name, or another
        process is writing it, and OSError where there is no room.
        """
        try:
            self.out = _free_place(out)
            self.folder = self.out.parent / f".{self.out.name}.partial"
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            if error.errno in FULL:
                raise
            told = f"{out}: no folder can be made there ({error.strerror}); name another"
            raise UserError(told) from None
        self._files = _divide(tensors, max_file_bytes)
        self._file_of = {name: file for file, names in self._files.items() for name in names}
        self._headers = {
            file: file_header({name: tensors[name] for name in names})
            for file, names in self._files.items()
        }
        self._open: dict[str, int] = {}
        headers = b"".join(start for start, _ in self._headers.values())
        own = hashlib.sha256(fingerprint.encode() + headers).hexdigest()
        self._journal, self.done = self._take_up(own)
        self._left = {f: set(names) - self.done for f, names in self._files.items()}

    def write(self, name: str, array: np.ndarray) -> None:
        """Puts one tensor, of the shape and dtype that were announced, into its place."""
        file = self._file_of[name]
        descriptor = self._descriptor(file)
        _write_at(descriptor, raw_bytes(array), self._headers[file][1][name])
        self._note({"tensor": name, "boot": _boot_id()})
        self._left[file].discard(name)
        if not self._left[file]:
            os.fsync(descriptor)
            os.close(self._open.pop(file))
            self._note({"file": file})

    def finish(self) -> None:
        """Gives the folder its name. Every tensor has been written."""
        assert not any(self._left.values()), "tensors are missing"
        if len(self._files) > 1:
            index = {
                "metadata": {"total_size": self.bytes},
                "weight_map": dict(sorted(self._file_of.items())),
            }
            write_text(self.folder / INDEX, json.dumps(index, indent=2) + "\n")
        (self.folder / JOURNAL).unlink()
        sync_folder(self.folder)
        os.replace(self.folder, self.out)
        sync_folder(self.out.parent)
        self.close()

    def discard(self) -> None:
        """Removes everything: this attempt is not to be gone on with."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Lets go of the files; what is written stays."""
        while self._open:
            os.close(self._open.popitem()[1])
        self._journal.close()

    @property
    def bytes(self) -> int:
        """Of all tensors."""
        return sum(
            info["data_offsets"][1] - info["data_offsets"][0]
            for start, _ in self._headers.values()
            for name, info in json.loads(start[8:]).items()
            if name != "__metadata__"
        )

    def _take_up(self, fingerprint: str) -> tuple[IO[str], set[str]]:
        """The open, locked journal, and the tensors that are written."""
        journal = locked(self.folder / JOURNAL, self.out)
        journal.seek(0)
        text = journal.read()
        if text and not text.endswith("\n"):
            print(file=journal, flush=True)  # behind the line on which a writer was killed
        notes = _notes(text)
        if notes[:1] == [{"fingerprint": fingerprint}]:
            return journal, self._written(notes[1:])
        for path in self.folder.iterdir():
            if path.name != JOURNAL:
                path.unlink()
        journal.truncate(0)
        print(json.dumps({"fingerprint": fingerprint}), file=journal, flush=True)
        return journal, set()

    def _written(self, notes: list[dict]) -> set[str]:
        on_disk = {note["file"] for note in notes if "file" in note}
        boot = _boot_id()
        done = {name for file in on_disk for name in self._files.get(file, ())}
        for note in notes:
            if note.get("boot") == boot and (self.folder / self._file_of[note["tensor"]]).exists():
                done.add(note["tensor"])
        return done

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            path = self.folder / file
            self._open[file] = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
            _write_at(self._open[file], memoryview(self._headers[file][0]), 0)
        return self._open[file]

    def _note(self, note: dict) -> None:
        print(json.dumps(note), file=self._journal, flush=True)


def _free_place(out: Path) -> Path:
    """Where ``out`` is, links followed, if a folder can be given that name."""
    place = Path(os.path.realpath(out))
    if os.path.lexists(place) and (not place.is_dir() or any(place.iterdir())):
        raise UserError(f"{out} exists already and is not empty; name another folder")
    if place == Path.cwd() or place.is_mount():
        kind = "where file systems meet" if place.is_mount() else "the folder that you are in"
        raise UserError(f"{out} is {kind}, which cannot be replaced; name a folder in it")
    return place


def _notes(text: str) -> list[dict]:
    notes = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError):  # a line cut short
            notes.append(json.loads(line))
    return notes


def _divide(tensors: Mapping[str, Any], max_file_bytes: int) -> dict[str, list[str]]:
    """File to the names in it, in order; as many files as it takes."""
    groups: list[list[str]] = [[]]
    size = 0
    for name, leaf in tensors.items():
        nbytes = int(np.prod(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        if groups[-1] and size + nbytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    if len(groups) == 1:
        return {SINGLE: groups[0]}
    return {
        f"model-{number:05}-of-{len(groups):05}.safetensors": names
        for number, names in enumerate(groups, 1)
    }


def _write_at(descriptor: int, data: memoryview, place: int) -> None:
    while data:
        count = os.pwrite(descriptor, data, place)
        data, place = data[count:], place + count


def _boot_id() -> str:
    try:
        return _BOOT.read_text().strip()
    except OSError:
        return ""
