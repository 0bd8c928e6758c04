"""Errors of libraries that read files from others, reported in one line."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from sdjax.core.errors import UserError

_MAX_REASON = 300


@contextlib.contextmanager
def library_errors(
    path: Path, problem: str, *, then: str = "copy the file again"
) -> Iterator[None]:
    """Report whatever a library raises in the block as a user error.

    On damaged files libraries raise anything, and those written in Rust panic.

    Args:
        path: the file or folder.
        problem: what failed, such as "cannot be read".
        then: what to do.

    Raises:
        UserError: the library raised an exception.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A panic is not an Exception, as Ctrl-C is not, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = " ".join(str(error).split())[:_MAX_REASON] or type(error).__name__
        raise UserError(f"{path}: {problem} ({reason}); {then}") from None
