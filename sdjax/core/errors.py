"""Exceptions for user errors and for transient failures."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from sdjax.core.text import cut_middle

MAX_MESSAGE = 2_000  # characters of a message


class UserError(Exception):
    """A user error: what is wrong, where (file, key, tensor, line) and what to do, in one line.

    The command line prints the message without a traceback and exits with status 2. Line breaks
    become spaces, and a message longer than `MAX_MESSAGE` loses its middle, since it may quote
    what a file from someone else contains.
    """

    def __str__(self) -> str:
        """Return the message."""
        return cut_middle(" ".join(super().__str__().splitlines()), MAX_MESSAGE)


class TransientError(UserError):
    """A full disk or an unavailable file system; a later attempt may succeed.

    Partial results are kept for that attempt.
    """


def truncated_repr(value: Any, max_chars: int = 60) -> str:
    """Return the `repr` of a value for an error message, cut to `max_chars` characters."""
    text = repr(value)
    return text if len(text) <= max_chars else f"{text[: max_chars - 1]}…"


def closest_name(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that is most similar to `name`, or None if none is similar.

    Args:
        name: a name that is not allowed, such as a misspelled key or method.
        allowed: the allowed names.
    """
    by_lower_case = {other.lower(): other for other in allowed}
    similar = difflib.get_close_matches(name.lower(), by_lower_case, 1)
    return by_lower_case[similar[0]] if similar else None


def did_you_mean(name: str, allowed: Iterable[str], advice: str) -> str:
    """Return the advice, after "did you mean X?" if an allowed name is similar to `name`.

    Args:
        name: a name that is not allowed.
        allowed: the allowed names.
        advice: what to do, such as "allowed: a, b".
    """
    similar = closest_name(name, allowed)
    return advice if similar is None else f"did you mean {similar}? {advice}"
