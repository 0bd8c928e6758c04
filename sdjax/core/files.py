"""Files of others, read within a limit: regular files only, never a pipe or a device."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any, BinaryIO

from sdjax.core.errors import UserError
from sdjax.core.json import parse_json

# Far above the files of known models.
MAX_TEXT_BYTES = 10_000_000  # config.json, a chat template, a prompt, a program
MAX_INDEX_BYTES = 50_000_000  # model.safetensors.index.json, 100 bytes per tensor
MAX_VOCABULARY_BYTES = 150_000_000  # tokenizer.json, tokenizer.model and the like


def open_file(path: Path) -> BinaryIO:
    """Open a file for reading, at once: a pipe without a writer does not block.

    Raises:
        UserError: the file does not exist, cannot be read, or is a folder, pipe, socket or device.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{path}: cannot be read ({reason}); check the path") from None
    file = os.fdopen(descriptor, "rb") if _is_regular(descriptor) else None
    if file is None:
        os.close(descriptor)
        raise UserError(f"{path}: not a file, but a folder, pipe or device; pass a regular file")
    return file


def read_bytes(path: Path, max_bytes: int) -> bytes:
    """Read a file.

    Args:
        path: the file.
        max_bytes: size limit.

    Raises:
        UserError: as in `open_file`, or the file is larger.
    """
    with open_file(path) as file:
        try:
            content = file.read(max_bytes + 1)
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); check the disk") from None
    if len(content) > max_bytes:
        raise UserError(
            f"{path}: larger than {max_bytes:,} bytes, which no file of this kind is; "
            "check that it is the right file"
        )
    return content


def read_text(path: Path, max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Read a text file in UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        max_bytes: size limit.

    Raises:
        UserError: as in `read_bytes`, or the file is not UTF-8.
    """
    try:
        return read_bytes(path, max_bytes).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8"
        ) from None


def read_json_file(path: Path, max_bytes: int = MAX_TEXT_BYTES, *, non_finite: bool = False) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        max_bytes: size limit.
        non_finite: accept NaN and Infinity.

    Raises:
        UserError: as in `read_bytes`, or the file is not JSON as in `parse_json`.
    """
    try:
        return parse_json(read_bytes(path, max_bytes), non_finite=non_finite)
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); copy the file again") from None


def _is_regular(descriptor: int) -> bool:
    return stat.S_ISREG(os.fstat(descriptor).st_mode)
