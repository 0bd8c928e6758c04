"""Files with the text of a program."""

from __future__ import annotations

from pathlib import Path

from sdjax.core.files import open_file


def read_program(file: Path | str, max_bytes: int) -> str:
    """Return the text of a program file; the sandbox refuses one that is longer or not UTF-8."""
    with open_file(Path(file)) as source:
        return source.read(max_bytes + 1).decode("utf-8-sig", "surrogateescape")
