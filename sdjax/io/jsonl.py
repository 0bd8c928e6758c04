"""JSONL files, the format of datasets that a user provides; also compressed, as `x.jsonl.gz`."""

from __future__ import annotations

import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sdjax.core.errors import UserError
from sdjax.core.files import open_file
from sdjax.core.json import parse_json

MAX_LINE_BYTES = 4_000_000  # tokenizers need a second per million
MAX_DECOMPRESSED_BYTES = 2_000_000_000
MAX_RATIO = 100  # of a compressed file's content to its size; JSON of real data has 3 to 20
_SMALL_BYTES = 10_000_000  # content of any ratio
_BLOCK_BYTES = 1 << 20
_SHOWN_FIELDS = 200
# The rest of a line, its end, and blank lines after it.
_REST_AND_BLANK = re.compile(rb"([^\n]*)(\n(?:[ \t\r\v\f]*\n)*+)")


def read_jsonl(path: str | Path, fields: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """Read the objects of a JSONL file; blank lines are skipped.

    Args:
        path: the file, in UTF-8; compressed if its name ends in `.gz`.
        fields: the fields that every object must have.

    Returns:
        (line number from 1, object) of each line.

    Raises:
        UserError: no such file, a line that is not a JSON object with these fields, or too much
            data in a line or a compressed file.
    """
    file = Path(os.path.expanduser(path))
    if not os.path.exists(file):
        raise UserError(f"{path}: no such file; give a file with one JSON object per line")
    rows = []
    for number, line in _lines(file):
        try:
            row = parse_json(line)
        except ValueError as error:
            raise UserError(
                f"{path}, line {number}: not JSON ({error}); write one object per line"
            ) from None
        if not isinstance(row, dict) or any(field not in row for field in fields):
            expected = ", ".join(fields)
            found = ", ".join(row)[:_SHOWN_FIELDS] if isinstance(row, dict) else "not an object"
            found = " ".join(found.split())
            raise UserError(f"{path}, line {number}: needs the fields {expected}; found: {found}")
        rows.append((number, row))
    return rows


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield the number, from 1, and the content of each line that is not blank.

    Blank lines are skipped in bulk, since a compressed file may have a billion.
    """
    number, line = 1, b""  # the line that a block has begun
    for block in _blocks(path):
        position = 0
        while match := _REST_AND_BLANK.match(block, position):
            line += match[1]
            _check_length(path, number, line)
            if line.strip():
                yield number, line
            number += match[2].count(b"\n")
            line, position = b"", match.end()
        line += block[position:]
        _check_length(path, number, line)
    if line.strip():
        yield number, line


def _check_length(path: Path, number: int, line: bytes) -> None:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(
            f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; write one object per "
            "line"
        )


def _blocks(path: Path) -> Iterator[bytes]:
    """Yield the content of a file, without reading further than the limits."""
    with open_file(path) as file:
        source: IO[bytes] = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[assignment]
        size = os.fstat(file.fileno()).st_size
        limit = min(MAX_DECOMPRESSED_BYTES, max(MAX_RATIO * size, _SMALL_BYTES))
        total = 0
        try:
            while block := source.read(_BLOCK_BYTES):
                total += len(block)
                if source is not file and total > limit:
                    raise UserError(
                        f"{path}: more than {limit:,} bytes when decompressed; decompress it "
                        "yourself if you trust it"
                    )
                yield block
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{path}: cannot be read ({reason}); copy the file again") from None
