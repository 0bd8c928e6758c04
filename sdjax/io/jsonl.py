"""JSONL files, the format of datasets that a user provides; also compressed, as `x.jsonl.gz`."""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any

from sdjax.core.errors import UserError
from sdjax.core.files import open_file
from sdjax.core.json import parse_json

MAX_LINE_BYTES = 50_000_000
MAX_DECOMPRESSED_BYTES = 2_000_000_000  # of a compressed file, whose size says nothing
_SHOWN_FIELDS = 200


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
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
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


def _lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file, without reading further than the limits."""
    with open_file(path) as file:
        source: IO[bytes] = gzip.GzipFile(fileobj=file) if path.suffix == ".gz" else file  # type: ignore[assignment]
        total, number = 0, 0
        try:
            while line := source.readline(MAX_LINE_BYTES + 1):
                total, number = total + len(line), number + 1
                if len(line) > MAX_LINE_BYTES:
                    raise UserError(
                        f"{path}, line {number}: longer than {MAX_LINE_BYTES:,} bytes; write one "
                        "object per line"
                    )
                if source is not file and total > MAX_DECOMPRESSED_BYTES:
                    raise UserError(
                        f"{path}: more than {MAX_DECOMPRESSED_BYTES:,} bytes when decompressed; "
                        "decompress it yourself if you trust it"
                    )
                yield line
        except (OSError, EOFError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise UserError(f"{path}: cannot be read ({reason}); copy the file again") from None
