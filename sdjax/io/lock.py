"""One writer a folder, by the lock of a file that is open as long as somebody writes."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import IO

from sdjax.core.errors import UserError


def locked(path: Path, folder: Path) -> IO[str]:
    """A file, open to append and to read, that is locked until it is closed, or its process dead.

    folder: what the lock is for.
    Raises UserError where another process has it.
    """
    file = path.open("a+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(
            f"{folder}: is being written by another process; wait for it or stop it"
        ) from None
    return file
