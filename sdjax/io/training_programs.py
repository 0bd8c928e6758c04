"""The programs that a generator was trained on, kept beside its weights.

By them a report tells what a generator invented from what it remembers.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Self

import numpy as np

from sdjax.errors import UserError
from sdjax.io.folders import TRAINING_PROGRAMS
from sdjax.io.weights_file import write_bytes

TEXTS = "training_programs.json.gz"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPrograms:
    """Attributes: texts: distinct; identities: the first 64 bits of each, sorted uint64."""

    texts: tuple[str, ...]
    identities: np.ndarray

    @classmethod
    def of(cls, texts: Sequence[str], identities: Iterable[int | None]) -> Self:
        """identities: None of a program that is refused."""
        known = sorted({one for one in identities if one is not None})
        return cls(texts=tuple(texts), identities=np.array(known, np.uint64))

    def write(self, folder: Path) -> list[Path]:
        """Writes both files into a folder, the identities last; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        write_bytes(folder / TEXTS, [gzip.compress(json.dumps(self.texts).encode(), mtime=0)])
        partial = folder / f".{TRAINING_PROGRAMS}.partial"
        with partial.open("wb") as file:
            np.save(file, self.identities)
        os.replace(partial, folder / TRAINING_PROGRAMS)
        return [folder / TRAINING_PROGRAMS, folder / TEXTS]


def read_training_texts(folder: Path) -> tuple[str, ...] | None:
    """The texts beside a model's weights; None where it does not tell.

    Raises:
        UserError: the file is damaged.
    """
    path = folder / TEXTS
    if not path.is_file():
        return None
    try:
        return tuple(json.loads(gzip.decompress(path.read_bytes())))
    except (OSError, EOFError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the model again") from None
