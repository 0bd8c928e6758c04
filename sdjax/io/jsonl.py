"""JSONL files, the format of datasets that a user provides."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError


def read_jsonl(path: str | Path, fields: Sequence[str]) -> list[tuple[int, dict[str, Any]]]:
    """Read the objects of a JSONL file; blank lines are skipped.

    Args:
        path: the file, in UTF-8.
        fields: the fields that every object must have.

    Returns:
        (line number from 1, object) of each line.

    Raises:
        UserError: no such file, not UTF-8, or a line that is not a JSON object with these fields.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise UserError(f"{path}: no such file; give a file with one JSON object per line")
    try:
        # Not `splitlines`, which also splits at U+2028 and the like.
        lines = file.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}, byte {error.start}: not UTF-8; save the file as UTF-8") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise UserError(f"{path}, line {number}: not JSON; write one object per line") from None
        if "\\ud" in line.lower():
            try:
                json.dumps(row, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise UserError(
                    f"{path}, line {number}: contains half of a surrogate pair; write the whole "
                    "character"
                ) from None
        if not isinstance(row, dict) or any(field not in row for field in fields):
            expected = ", ".join(fields)
            found = ", ".join(map(str, row)) if isinstance(row, dict) else "not an object"
            raise UserError(f"{path}, line {number}: needs the fields {expected}; found: {found}")
        rows.append((number, row))
    return rows
