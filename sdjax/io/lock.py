"""Single-writer lock of a folder, which the system releases when its process ends."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from sdjax.core.errors import UserError
from sdjax.io.links import check_own_folder


def lock_folder(folder: Path, name: str) -> FileLock:
    """Acquire the lock of a folder without waiting; call `release()` on the result.

    Args:
        folder: an existing folder of sdjax's own files.
        name: file name of the lock in it.

    Raises:
        UserError: another process holds the lock, or the folder contains a link.
    """
    check_own_folder(folder.resolve())
    lock = FileLock(folder / name, timeout=0, thread_local=False)
    try:
        lock.acquire()
    except Timeout:
        raise UserError(
            f"{folder}: is being written by another process; wait for it or stop it"
        ) from None
    return lock
