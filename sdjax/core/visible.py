"""Untrusted text made safe to show, as in a terminal or a report."""

from __future__ import annotations

import unicodedata

MAX_LENGTH = 20_000  # longer strings are truncated to this many characters
# Control characters, invisible format characters such as bidirectional marks, surrogates, and
# private use.
_HIDDEN = ("Cc", "Cf", "Cs", "Co")


def escape(text: str) -> str:
    """Return the text with control characters and bidirectional marks replaced by codes.

    Otherwise a file name, a chat template or a message in a file from someone else could rewrite
    what a terminal shows, or reprogram the terminal.
    """
    return "".join(
        c if c in "\n\t" or unicodedata.category(c) not in _HIDDEN else f"\\u{{{ord(c):04x}}}"
        for c in text
    )


def visible(text: str) -> str:
    """Return the text as `escape` does, truncated to `MAX_LENGTH` characters."""
    shown = escape(text[:MAX_LENGTH])
    return shown if len(text) <= MAX_LENGTH else f"{shown}\n… ({len(text)} characters in total)"
