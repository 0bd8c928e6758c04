"""Errors of disks and file systems, reported in one line with the file and what to do.

A full disk, a read-only file system or a folder that is removed while a command runs can make any
write fail. Code that writes wraps it in `storage_errors`, which names the file and how to continue.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from sdjax.core.errors import TransientError, UserError

# What is wrong, and what to do about it.
_REASONS = {
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("the disk quota is exceeded", "free some space"),
    errno.EFBIG: ("the file is too large for the file system or its limit", "raise the limit"),
    errno.EROFS: ("the file system is read-only", "make it writable, or choose another folder,"),
    errno.EACCES: ("permission denied", "make it writable, or choose another folder,"),
    errno.EPERM: ("permission denied", "make it writable, or choose another folder,"),
    errno.EIO: ("the disk failed (input/output error)", "check the disk"),
    errno.ESTALE: ("the file system is gone (stale file handle)", "mount it again"),
    errno.ENOENT: ("no such file or folder", "check the path"),
    errno.ENOTDIR: ("part of the path is a file", "choose another folder"),
    errno.EISDIR: ("is a folder, not a file", "choose another name"),
    errno.EEXIST: ("is a file, not a folder", "choose another folder"),
    errno.ENAMETOOLONG: ("the name is too long", "choose a shorter one"),
    errno.ELOOP: ("the symbolic links form a loop", "choose another folder"),
    errno.EMFILE: ("too many open files", "raise the limit with ulimit -n"),
    errno.ENFILE: ("too many open files", "close other programs"),
}
# Also recognized in the causes of an error, and in the messages of libraries.
_WRAPPED = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO)
# The fault of the machine, wherever they occur. Others, such as a missing file, may be our mistake
# unless `storage_errors` surrounds the code.
DISK_FAULTS = (*_WRAPPED, errno.EPERM, errno.ESTALE)
_SQLITE = {
    sqlite3.SQLITE_READONLY_DBMOVED: errno.ENOENT,  # the file was removed or replaced
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_PERM: errno.EACCES,
}


@contextlib.contextmanager
def storage_errors(path: Path | str, *, then: str = "run the same command again") -> Iterator[None]:
    """Report a storage error in this block in one line.

    Args:
        path: the file or folder being written, for errors that do not name one.
        then: what to do after the cause is removed.

    Raises:
        TransientError: a storage error, naming the file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = storage_reason(error)
        if reason is None:
            raise
        name = file_of(error)
        # A hidden name belongs to `path`, which is being written under it.
        where = path if name is None or Path(name).name.startswith(".") else name
        raise TransientError(f"{where}: {reason} and {then}") from None


def storage_reason(error: BaseException) -> str | None:
    """Return what is wrong and what to do, or None if it is not a storage error."""
    number = storage_errno(error)
    return None if number is None else "; ".join(_REASONS[number])


def storage_errno(error: BaseException) -> int | None:
    """Return the errno of a storage error, or None for any other error.

    SQLite's errors are translated, and errors that a library has wrapped are recognized by their
    text or by their causes.
    """
    number = _own_errno(error)
    seen: set[int] = set()
    while number is None:
        text = str(error)
        number = next((known for known in _WRAPPED if os.strerror(known) in text), None)
        seen.add(id(error))
        cause = error.__cause__ or error.__context__
        if number is not None or cause is None or id(cause) in seen:
            break
        error = cause
        own = _own_errno(error)
        number = own if own in _WRAPPED else None
    return number


def file_of(error: BaseException) -> str | None:
    """Return the file that a system error names."""
    name = getattr(error, "filename2", None) or getattr(error, "filename", None)
    return os.fsdecode(name) if isinstance(name, str | bytes | os.PathLike) else None


def _own_errno(error: BaseException) -> int | None:
    if isinstance(error, sqlite3.Error):
        code = getattr(error, "sqlite_errorcode", 0)
        return _SQLITE.get(code, _SQLITE.get(code & 0xFF))  # the low byte is the general code
    if isinstance(error, OSError) and error.errno in _REASONS:
        return error.errno
    return None
