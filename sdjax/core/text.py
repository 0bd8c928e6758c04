"""Text for tables of fixed width."""

from __future__ import annotations


def cut_middle(text: str, width: int) -> str:
    """Return the text, its middle replaced by "…" if it has more than `width` characters.

    The end of a path says more than its middle.
    """
    if len(text) <= width:
        return text
    head = (width - 1) // 3
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"
