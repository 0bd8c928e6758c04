"""The programs that a generator was trained on, kept beside its weights.

By them a report tells what a generator invented from what it remembers.
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

from sdjax.core.errors import UserError
from sdjax.io.model_paths import TRAINING_PROGRAMS
from sdjax.io.safetensors_writer import write_bytes, write_whole

TEXTS = "training_programs.json.gz"
NO_CONTRACT = "several"


@dataclasses.dataclass(frozen=True, kw_only=True, eq=False)
class TrainingPrograms:
    """What a generator was trained on.

    Attributes:
        texts: distinct.
        identities: the first 64 bits of each, sorted uint64.
        contract: of the slots and tensors that the identities are of; a program has another
            identity over others.
    """

    texts: tuple[str, ...]
    identities: np.ndarray
    signature: str

    @classmethod
    def of(cls, texts: Sequence[str], identities: Iterable[int | None], *, signature: str) -> Self:
        """identities: None of a program that is refused."""
        known = sorted({one for one in identities if one is not None})
        return cls(texts=tuple(texts), identities=np.array(known, np.uint64), signature=signature)

    def beside(self, earlier: Self | None) -> Self:
        """Together with what the generator had learnt before.

        Of programs whose identities are over another contract nobody can tell whether a program is
        one of them, so the two together have none.
        """
        if earlier is None:
            return self
        same = earlier.signature == self.signature
        return dataclasses.replace(
            self,
            texts=tuple(dict.fromkeys((*earlier.texts, *self.texts))),
            identities=np.union1d(earlier.identities, self.identities),
            signature=self.signature if same else NO_CONTRACT,
        )

    def write(self, folder: Path) -> list[Path]:
        """Writes both files into a folder, the identities last; their paths."""
        folder.mkdir(parents=True, exist_ok=True)
        told = json.dumps({"contract": self.signature, "texts": self.texts})
        write_bytes(folder / TEXTS, [gzip.compress(told.encode(), mtime=0)])
        identities = io.BytesIO()
        np.save(identities, self.identities)
        write_whole(folder / TRAINING_PROGRAMS, [identities.getbuffer()])
        return training_program_files(folder)


def training_program_files(folder: Path) -> list[Path]:
    """Those of a model's folder, which go with its weights; none where it does not tell."""
    return [folder / name for name in (TRAINING_PROGRAMS, TEXTS) if (folder / name).is_file()]


def read_training_texts(folder: Path) -> tuple[str, ...] | None:
    """The texts beside a model's weights; None where it does not tell.

    Raises:
        UserError: the file is damaged.
    """
    told = _read(folder)
    return None if told is None else tuple(told["texts"])


def read_training_programs(folder: Path) -> TrainingPrograms | None:
    """What lies beside a model's weights; None where it does not tell.

    Raises:
        UserError: a file is damaged.
    """
    path, told = folder / TRAINING_PROGRAMS, _read(folder)
    if not path.is_file() or told is None:
        return None
    try:
        with path.open("rb") as file:
            found = np.lib.format.read_array(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        reason = " ".join(str(error).split())[:200]
    else:
        if found.dtype == np.uint64 and found.ndim == 1:
            return TrainingPrograms(
                texts=tuple(told["texts"]), identities=found, signature=told["contract"]
            )
        reason = f"it holds {found.dtype} {list(found.shape)}"
    raise UserError(
        f"{path}: is no list of the programs that the seed was trained on ({reason}); restore the "
        "file, or remove it: the report then does not tell which programs are remembered"
    )


def read_training_identities(folder: Path, signature: str) -> np.ndarray | None:
    """The identities beside a model's weights; None where it does not tell of this contract."""
    found = read_training_programs(folder)
    return found.identities if found is not None and found.signature == signature else None


def _read(folder: Path) -> dict[str, Any] | None:
    path = folder / TEXTS
    if not path.is_file():
        return None
    try:
        told = json.loads(gzip.decompress(path.read_bytes()))
        return {"contract": str(told["contract"]), "texts": list(map(str, told["texts"]))}
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path}: cannot be read ({error}); copy the model again") from None
