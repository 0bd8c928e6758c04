"""Extraction of candidates' source code from generated text."""

from __future__ import annotations

import re
from collections.abc import Iterator

_OPENING = re.compile(r"([ \t]*)(`{3,}|~{3,})[ \t]*([\w+-]*)([^\n]*)")
_START = re.compile(r"^(?:import\s|from\s+[\w.]+\s+import\b|def\s+\w+\s*\(|@\w)", re.MULTILINE)
_MERGE_FUNCTION = re.compile(r"^def\s+merge_(?:models|trees)\b", re.MULTILINE)
_PYTHON = ("", "python", "py", "python3")
_QUOTES = ('"""', "'''")  # of strings with several lines
_CODE_INDENT = 4  # a fence that is indented this much more than the opening one is code


def extract_source(text: str) -> str | None:
    """Return the source code in generated text, or None if there is none.

    The source is the last fenced block that defines a merge function, among those that are marked
    as Python or have no language. Without such a block it is the last part between fences that
    defines a merge function, from its first import, definition or decorator on, and the last fenced
    block otherwise. Reasoning before it is ignored.
    """
    text = text.replace("\r\n", "\n")
    blocks = list(_python_blocks(text))
    for source in reversed(blocks):
        if _MERGE_FUNCTION.search(source):
            return _tidy(source)
    parts = [part[start.start() :] for part in _parts(text) if (start := _START.search(part))]
    for part in reversed(parts):
        if _MERGE_FUNCTION.search(part):
            return _tidy(part)
    if parts and not blocks:
        return _tidy(parts[-1])
    return _tidy(blocks[-1]) if blocks else None


def _python_blocks(text: str) -> Iterator[str]:
    """Yield the fenced blocks that are marked as Python or have no language.

    As in Markdown, a block ends at a fence of the same character that is at least as long and at
    most three spaces further to the right, or with the text: generation may hit the token limit.
    """
    lines = iter(text.split("\n"))
    for line in lines:
        opening = _OPENING.fullmatch(line)
        if opening is None or (opening[2][0] == "`" and "`" in opening[4]):
            continue
        indent, fence, language, _ = opening.groups()
        body = []
        for inner in lines:
            if _closes(inner, indent, fence):
                break
            body.append(inner[len(indent) :] if inner.startswith(indent) else inner.lstrip(" \t"))
        if language.lower() in _PYTHON:
            yield "\n".join(body)


def _parts(text: str) -> Iterator[str]:
    """Yield the parts of a text between its fences, except fences that are indented or quoted."""
    part: list[str] = []
    quoted = dict.fromkeys(_QUOTES, False)
    for line in text.split("\n"):
        fence = _OPENING.fullmatch(line)
        if fence is not None and not fence[1] and not any(quoted.values()):
            yield "\n".join(part)
            part = []
            continue
        part.append(line)
        quoted = {marks: state ^ bool(line.count(marks) % 2) for marks, state in quoted.items()}
    yield "\n".join(part)


def _closes(line: str, indent: str, fence: str) -> bool:
    marks = line.strip(" \t")
    within = len(line.expandtabs()) - len(line.expandtabs().lstrip())
    return (
        len(marks) >= len(fence)
        and set(marks) == {fence[0]}
        and within < len(indent.expandtabs()) + _CODE_INDENT
    )


def _tidy(source: str) -> str | None:
    """Remove outer blank lines and trailing spaces; return None if nothing is left."""
    lines = [line.rstrip() for line in source.strip("\n").split("\n")]
    source = "\n".join(lines).strip("\n")
    return source + "\n" if source.strip() else None
