"""Exceptions for user errors and for transient failures."""

from __future__ import annotations

from typing import Any


class UserError(Exception):
    """A user error: what is wrong, where (file, key, tensor, line) and what to do, in one line.

    The command line prints the message without a traceback and exits with status 2.
    """


class TransientError(UserError):
    """A full disk or an unavailable file system; a later attempt may succeed.

    Partial results are kept for that attempt.
    """


def truncated_repr(value: Any, max_chars: int = 60) -> str:
    """Return the `repr` of a value for an error message, cut to `max_chars` characters."""
    text = repr(value)
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"
