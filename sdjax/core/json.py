"""JSON from others: every value that is read is one that can be written, printed and walked."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_LEVELS = 100  # far above any real file's; libraries recurse on what is read
MAX_DIGITS = 300  # of an integer; more cannot be converted to a float


def parse_json(text: str | bytes, *, non_finite: bool = False) -> Any:
    """Parse JSON text of a bounded length.

    Memory is at most 30 times the size of the text, which the caller bounds.

    Args:
        text: the text; bytes are decoded as UTF-8, with or without a byte order mark.
        non_finite: accept NaN, Infinity and numbers that overflow to it, as `config.json` of some
            models has them.

    Raises:
        ValueError: not JSON, not UTF-8, more than `MAX_LEVELS` levels, a key that an object has
            twice, an integer of more than `MAX_DIGITS` digits, or half of a surrogate pair. The
            message is one line.

    Examples:
        >>> parse_json('{"a": [1, 2.5, null]}')
        {'a': [1, 2.5, None]}
        >>> parse_json('{"a": 1, "a": 2}')
        Traceback (most recent call last):
        ValueError: duplicate key 'a'
    """
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"not UTF-8 at byte {error.start}") from None
    try:
        value = (_LENIENT if non_finite else _STRICT).decode(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if _levels(value) > MAX_LEVELS:
        raise ValueError(f"nested too deeply; at most {MAX_LEVELS} levels")
    if "\\ud" in text.lower():
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("contains half of a surrogate pair") from None
    return value


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"duplicate key {key[:60]!r}")
            seen.add(key)
    return fields


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"an integer of {len(digits):,} digits")
    return int(digits)


def _finite(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError(f"the number {digits[:60]} is too large")
    return value


def _constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a number")


_LENIENT = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer)
_STRICT = json.JSONDecoder(
    object_pairs_hook=_object,
    parse_int=_integer,
    parse_float=_finite,
    parse_constant=_constant,
)


def _levels(value: Any) -> int:
    """Return the number of nested lists and objects, without recursion."""
    levels, containers = 0, [value] if isinstance(value, list | dict) else []
    while containers:
        levels += 1
        containers = [
            child
            for container in containers
            for child in (container.values() if isinstance(container, dict) else container)
            if isinstance(child, list | dict)
        ]
    return levels
