"""The one exception for a user's mistake, and how its message quotes."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """What is wrong, where (file, key, tensor, line) and what to do, in one line.

    The command line prints the message without a traceback and exits with status 2.
    """


class TransientError(UserError):
    """A full disk, a file system that is away: calling again may succeed, so that whatever is done
    already is kept.
    """


def truncated_repr(value: Any, most: int = 60) -> str:
    """A value as a message quotes it: in one line, of at most so many letters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
