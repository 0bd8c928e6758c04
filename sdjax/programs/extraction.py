"""Extraction of candidates' source code from generated text."""

from __future__ import annotations

import re

# An opening fence with an optional language, the code, and a closing fence or the end of the text
# (generation may hit the token limit before the closing fence).
_FENCED = re.compile(
    r"^[ \t]*(?P<fence>`{3,}|~{3,})[ \t]*(?P<language>[\w+-]*)[^\n]*\n"
    r"(?P<body>.*?)(?:^[ \t]*(?P=fence)[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_START = re.compile(r"^(?:import\s|from\s+[\w.]+\s+import\b|def\s+\w+\s*\(|@\w)", re.MULTILINE)
_PYTHON = ("", "python", "py", "python3")


def extract_source(text: str) -> str | None:
    """Return the source code in generated text, or None if there is none.

    The source is the last fenced block that is marked as Python or has no language. Without such a
    block, it starts at the first import, definition or decorator. Reasoning before it is ignored.
    """
    text = text.replace("\r\n", "\n")
    blocks = [
        match["body"] for match in _FENCED.finditer(text) if match["language"].lower() in _PYTHON
    ]
    if blocks:
        return _tidy(blocks[-1])
    start = _START.search(text)
    return _tidy(text[start.start() :]) if start else None


def _tidy(source: str) -> str | None:
    """Remove outer blank lines and trailing spaces; return None if nothing is left."""
    lines = [line.rstrip() for line in source.strip("\n").split("\n")]
    source = "\n".join(lines).strip("\n")
    return source + "\n" if source.strip() else None
