"""Files and folders that appear under their names only when they are complete and on disk.

Content is written under a hidden name, flushed with fsync and renamed. A process that is killed
leaves at most the hidden name behind, which the next attempt overwrites.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.core.storage_errors import storage_errors
from sdjax.io.links import check_own_folder, create_file


def write_file(path: Path, content: str | bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file atomically, replacing an existing one.

    Args:
        path: the file; at most one process may write it at a time.
        content: text (written as UTF-8), bytes, or the bytes in pieces.

    Raises:
        TransientError: the disk is full, the folder cannot be written, or the like.
    """
    if isinstance(content, str):
        content = content.encode()
    partial = partial_path(path)
    with storage_errors(path), _removed_unless_complete(partial):
        with os.fdopen(create_file(partial), "wb") as file:
            for piece in [content] if isinstance(content, bytes) else content:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        commit(partial, path)


@contextmanager
def staged_folder(folder: Path) -> Iterator[Path]:
    """Yield a hidden folder that becomes `folder` when the block completes.

    If the block raises, everything that it wrote is removed.

    Raises:
        UserError: `folder` exists and is not empty, or its name cannot be used.
        TransientError: the disk is full, the folder cannot be written, or the like.
    """
    with storage_errors(folder):
        target = resolve_new_folder(folder)
        partial = partial_path(target)
        check_own_folder(partial)
        shutil.rmtree(partial, ignore_errors=True)  # left by a killed process
        partial.mkdir(parents=True)
        with _removed_unless_complete(partial):
            yield partial
            commit(partial, target)


@contextmanager
def _removed_unless_complete(partial: Path) -> Iterator[None]:
    try:
        yield
    finally:  # nothing is left after a rename
        if partial.is_dir():
            shutil.rmtree(partial, ignore_errors=True)
        else:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def make_folder(folder: Path) -> None:
    """Create a folder and its parents, unless it exists.

    Raises:
        TransientError: the disk is full, the parent cannot be written, or the like.
    """
    with storage_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)


def partial_path(path: Path) -> Path:
    """Return the hidden name under which a file or folder is written."""
    return path.with_name(f".{path.name}.partial")


def commit(partial: Path, path: Path, *, overwrite: bool = False) -> None:
    """Rename a complete file, which is on disk, or a complete folder to its final name.

    The files of a folder are flushed first, because libraries write some of them without fsync.

    Args:
        partial: the complete file or folder.
        path: its final name.
        overwrite: replace a folder that has files.
    """
    if partial.is_dir():
        for entry in (*partial.rglob("*"), partial):
            flush(entry)
    if overwrite and path.is_dir():
        old = path.with_name(f".{path.name}.old")
        shutil.rmtree(old, ignore_errors=True)  # left by a killed process
        os.replace(path, old)
        os.replace(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        os.replace(partial, path)
    flush(path.parent)


def resolve_new_folder(folder: Path, *, overwrite: bool = False) -> Path:
    """Return the path of a folder that is to be written, with symbolic links resolved.

    Args:
        folder: the folder.
        overwrite: accept a model's folder, which has a config.json.

    Raises:
        UserError: it exists and is not empty, or it cannot be replaced.
    """
    with storage_errors(folder):
        target = Path(os.path.realpath(folder))
        if os.path.lexists(target) and not target.is_dir():
            raise UserError(f"{folder}: is a file; choose a folder that does not exist yet")
        if target.is_dir() and any(target.iterdir()):
            if not overwrite:
                raise UserError(
                    f"{folder}: exists and is not empty; remove it or choose another folder"
                )
            if not (target / "config.json").is_file():
                raise UserError(
                    f"{folder}: has files but no config.json, so it is not a model to overwrite; "
                    "choose another folder"
                )
        if target == Path.cwd() or target.is_mount():
            kind = "a mount point" if target.is_mount() else "the working directory"
            raise UserError(
                f"{folder}: is {kind}, which cannot be replaced; choose a folder inside it"
            )
        return target


def flush(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
