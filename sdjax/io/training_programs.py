"""The candidate programs that a generator was trained on, stored next to its weights.

With them, a report distinguishes the programs that a generator invented from those it remembers.
"""

from __future__ import annotations

import dataclasses
import gzip
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np

from sdjax.core.files import open_file
from sdjax.core.json import parse_json
from sdjax.io.atomic_write import make_folder, write_file
from sdjax.io.library_errors import library_errors
from sdjax.io.links import member
from sdjax.io.model_paths import TRAINING_PROGRAMS

SOURCES_FILE = "training_programs.json.gz"
MAX_SOURCES_BYTES = 2**28  # decompressed; 50 times the zoo's
MIXED_SIGNATURES = "several"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPrograms:
    """The programs that a generator was trained on.

    Attributes:
        sources: distinct source texts.
        identities: the first 64 bits of each identity, sorted uint64.
        signature: name of the merge signature for which the identities were computed; a program
            has a different identity under another signature.
    """

    sources: tuple[str, ...]
    identities: np.ndarray
    signature: str

    @classmethod
    def create(
        cls, sources: Sequence[str], identities: Iterable[int | None], *, signature: str
    ) -> Self:
        """Create an instance from sources and identities; rejected programs have identity None."""
        distinct = sorted({identity for identity in identities if identity is not None})
        array = np.array(distinct, np.uint64)
        return cls(sources=tuple(sources), identities=array, signature=signature)

    def union(self, earlier: Self | None) -> Self:
        """Return these programs and those of an earlier training.

        Identities under different signatures cannot be compared, so the union of programs with
        different signatures has a signature that matches nothing.
        """
        if earlier is None:
            return self
        same = earlier.signature == self.signature
        return dataclasses.replace(
            self,
            sources=tuple(dict.fromkeys((*earlier.sources, *self.sources))),
            identities=np.union1d(earlier.identities, self.identities),
            signature=self.signature if same else MIXED_SIGNATURES,
        )

    def write(self, folder: Path) -> list[Path]:
        """Write both files into a folder, identities last, and return their paths."""
        make_folder(folder)
        fields = json.dumps({"contract": self.signature, "texts": self.sources})
        write_file(folder / SOURCES_FILE, gzip.compress(fields.encode(), mtime=0))
        identities = io.BytesIO()
        np.save(identities, self.identities)
        write_file(folder / TRAINING_PROGRAMS, identities.getvalue())
        return training_program_files(folder)


def training_program_files(folder: Path) -> list[Path]:
    """Return the existing files of training programs in a model folder."""
    return [
        path
        for name in (TRAINING_PROGRAMS, SOURCES_FILE)
        if (path := member(folder, name)).is_file()
    ]


def read_training_sources(folder: Path) -> tuple[str, ...] | None:
    """Return the sources in a model folder, or None if it has none.

    Raises:
        UserError: the file is damaged.
    """
    fields = _read_fields(folder)
    return None if fields is None else tuple(fields["texts"])


def read_training_programs(folder: Path) -> TrainingPrograms | None:
    """Return the training programs of a model folder, or None if it has none.

    Raises:
        UserError: a file is damaged.
    """
    path, fields = member(folder, TRAINING_PROGRAMS), _read_fields(folder)
    if not path.is_file() or fields is None:
        return None
    with library_errors(
        path,
        "not a list of the programs that the model was trained on",
        then="restore the file, or remove it, and the report will not show which programs are "
        "remembered",
    ):
        with open_file(path) as file:
            identities = np.lib.format.read_array(file, allow_pickle=False)
        if identities.dtype != np.uint64 or identities.ndim != 1:
            raise ValueError(f"it contains {identities.dtype} {list(identities.shape)}")
    return TrainingPrograms(
        sources=tuple(fields["texts"]), identities=identities, signature=fields["contract"]
    )


def read_training_identities(folder: Path, signature: str) -> np.ndarray | None:
    """Return the identities in a model folder, or None if it has none for this signature."""
    programs = read_training_programs(folder)
    if programs is None or programs.signature != signature:
        return None
    return programs.identities


def _read_fields(folder: Path) -> dict[str, Any] | None:
    path = member(folder, SOURCES_FILE)
    if not path.is_file():
        return None
    with library_errors(path, "cannot be read", then="copy the model again"):
        with open_file(path) as compressed, gzip.GzipFile(fileobj=compressed) as file:
            text = file.read(MAX_SOURCES_BYTES + 1)
        if len(text) > MAX_SOURCES_BYTES:
            raise ValueError(f"more than {MAX_SOURCES_BYTES:,} bytes when decompressed")
        fields = parse_json(text)
        return {"contract": str(fields["contract"]), "texts": list(map(str, fields["texts"]))}
