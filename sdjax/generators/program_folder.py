"""The generator of a folder of programs that somebody wrote: each file is a sample, once."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.core.files import read_text
from sdjax.generators.types import GeneratedText, GenerationRequest, OnText
from sdjax.io.links import member

SUFFIX = ".py"
MAX_FILES = 10_000
MAX_FILE_BYTES = 1 << 20  # far more than any sandbox accepts as a program
_MAX_ENTRIES = 100_000  # of a folder, other files included


def read_programs(folder: Path) -> tuple[str, ...]:
    """Return the programs of a folder: the text of each file NAME.py, in the order of the names.

    Folders in it, and files whose names start with a dot, are ignored.

    Args:
        folder: the folder. Its files may come from someone else: each must be a regular file of at
            most a megabyte, and not a link that leads out of the folder.

    Raises:
        UserError: no such folder, no program in it, too many files, or a file that is refused.
    """
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for _, entry in zip(range(_MAX_ENTRIES), entries, strict=False)]
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"{folder}: cannot be read as a folder ({reason}); give a folder with programs, "
            f"NAME{SUFFIX}"
        ) from None
    programs = sorted(n for n in names if n.endswith(SUFFIX) and not n.startswith("."))
    if len(names) == _MAX_ENTRIES or len(programs) > MAX_FILES:
        raise UserError(
            f"{folder}: more than {MAX_FILES:,} programs or {_MAX_ENTRIES - 1:,} files; "
            "give a folder that contains only the programs to try"
        )
    if not programs:
        raise UserError(f"{folder}: no file NAME{SUFFIX}; give a folder with programs")
    return tuple(_read(folder, name) for name in programs)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProgramFolder:
    """The programs of a folder that no sample has taken.

    Attributes:
        programs: the programs in order; the first request gets the first one.
    """

    programs: Sequence[str]

    def sample(self, requests: Sequence[GenerationRequest], *, on_text: OnText) -> None:
        """Pass on the programs of the requests; see `sdjax.generators.types.Generator`."""
        for request, program in zip(requests, self.programs, strict=False):
            source = program if program.strip() else None
            on_text(request.number, GeneratedText(text=program, source=source, stopped=True))


def _read(folder: Path, name: str) -> str:
    path = member(folder, name)
    if path.is_dir():
        raise UserError(f"{path}: a folder, not a program; rename or remove it")
    return read_text(path, MAX_FILE_BYTES)
