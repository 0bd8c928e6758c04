"""Exceptions for user errors and for transient failures."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from typing import Any

from sdjax.core.text import cut_middle

MAX_MESSAGE = 2_000  # characters of a message
_MIN_SIMILARITY = 0.7  # of a suggestion; with less, "slope" would be one for "nope"


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
    """Return the `repr` of a value for an error message, cut to `max_chars` characters.

    Time and memory are bounded by `max_chars`, however large, nested or recursive the lists,
    tuples and dicts are: one that is referenced many times can be far longer than the file that
    contains it.

    Examples:
        >>> truncated_repr({"sizes": (1,)})
        "{'sizes': (1,)}"
        >>> truncated_repr(list(range(1_000_000)), 12)
        '[0, 1, 2, 3…'
    """
    text = ""
    for piece in _repr_pieces(value, max_chars):
        text += piece
        if len(text) > max_chars:
            return f"{text[: max_chars - 1]}…"
    return text


_BRACKETS: dict[Any, tuple[str, str]] = {list: ("[", "]"), tuple: ("(", ")"), dict: ("{", "}")}
_MAX_BITS = 10_000  # of an integer in decimal, whose conversion takes quadratic time


def _repr_pieces(value: Any, max_chars: int) -> Iterator[str]:
    """Yield the parts of the `repr` of a value in order, each of at least one character."""
    kind = type(value)
    if kind is str or kind is bytes:
        yield repr(value[: max_chars + 1])
    elif kind is int and value.bit_length() > _MAX_BITS:
        yield hex(value)
    elif kind in _BRACKETS:
        opening, closing = _BRACKETS[kind]
        yield opening
        for index, item in enumerate(value):
            if index:
                yield ", "
            yield from _repr_pieces(item, max_chars)
            if kind is dict:
                yield ": "
                yield from _repr_pieces(value[item], max_chars)
        yield ",)" if kind is tuple and len(value) == 1 else closing
    else:
        yield repr(value)


def closest_name(name: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name that is most similar to `name`, or None if none is similar.

    Args:
        name: a name that is not allowed, such as a misspelled key or method.
        allowed: the allowed names.
    """
    by_lower_case = {other.lower(): other for other in allowed}
    similar = difflib.get_close_matches(name.lower(), by_lower_case, 1, _MIN_SIMILARITY)
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
