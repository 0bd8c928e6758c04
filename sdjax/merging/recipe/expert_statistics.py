"""Statistics of the models of a merge from disk to disk, for methods that need them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from sdjax.core.errors import UserError, truncated_repr
from sdjax.io.model_paths import locate
from sdjax.io.statistics_folder import StatisticsFolder, default_folder
from sdjax.io.weights_digest import weights_digest
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.signature import STATISTICS
from sdjax.merging.statistics import BY, HOW, check_statistics, tensor_statistics


@dataclass(frozen=True, kw_only=True)
class StatisticRef:
    """A statistic of a model: its folder, its name, and its shape and dtype."""

    folder: StatisticsFolder
    name: str
    spec: jax.ShapeDtypeStruct

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape."""
        return self.spec.shape

    def read(self) -> np.ndarray:
        """Read it."""
        return self.folder[self.name]


StepStatistics = Mapping[str, tuple[StatisticRef, ...] | None]
"""The experts' statistics of one tensor by kind; None if the tensor has none."""


class _References(Mapping[str, StatisticRef]):
    """The statistics of one model, as references that read nothing."""

    def __init__(self, folder: StatisticsFolder):
        self.folder = folder
        self._specs = folder.shapes

    def __getitem__(self, name: str) -> StatisticRef:
        return StatisticRef(folder=self.folder, name=name, spec=self._specs[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._specs)

    def __len__(self) -> int:
        return len(self._specs)


class ExpertStatistics:
    """The statistics of the experts of one merge.

    Attributes:
        notes: for the user and the model card, where they come from.
    """

    def __init__(
        self, algorithm: Algorithm, folders: Sequence[StatisticsFolder], slots: Sequence[str]
    ):
        """Check that the statistics are those that an algorithm requests.

        Raises:
            UserError: a kind is missing.
        """
        self._requests, self._slots = algorithm.requests, tuple(slots)
        self._stats = [_References(folder) for folder in folders]
        check_statistics(algorithm.name, algorithm.requests, self._stats, slots)
        self.notes = tuple(
            f"statistics of {slot}: {folder.folder} ({folder.manifest.get('examples')} examples of "
            f"{folder.manifest.get('data') or folder.manifest.get('task')})"
            for slot, folder in zip(slots, folders, strict=True)
        )

    def of_tensor(
        self, paths: Mapping[int, str], shape: tuple[int, ...], *, realigned: bool = False
    ) -> StepStatistics:
        """Return the statistics of one tensor.

        Args:
            paths: number of each expert that has it to its canonical path there.
            shape: its shape.
            realigned: whether its rows are reordered to match tokens, which statistics are not.

        Raises:
            UserError: they do not match the tensor.
        """
        stats = [self._stats[number] for number in paths]
        slots = [self._slots[number] for number in paths]
        own = list(paths.values())
        found = tensor_statistics(self._requests, stats, slots, own, shape)
        if realigned and found.get("fisher"):
            raise UserError(
                f"{own[0]}: the vocabularies differ, and rows of statistics are not matched by "
                "token; use models with the same tokenizer"
            )
        return found


def needs_statistics(algorithm: Algorithm) -> bool:
    """Return whether an algorithm requests statistics of the experts."""
    return bool(algorithm.requests & set(STATISTICS))


def find_statistics(model: str, named: str | None, relative_to: Path) -> StatisticsFolder:
    """Open the statistics of a model, and check that they are those of its weights.

    Args:
        model: the model's name.
        named: their folder, if it is named.
        relative_to: folder that is searched before the working directory.

    Raises:
        UserError: there are none, or they were computed with other weights.
    """
    if named is not None:
        folders = [base / Path(named).expanduser() for base in (relative_to, Path.cwd())]
        folder: Path | None = next((f for f in folders if f.is_dir()), folders[-1])
    else:
        folder = default_folder(model, relative_to)
        if folder is not None and not folder.is_dir():
            folder = None
    if folder is None:
        raise UserError(
            f"no statistics of {model}; {HOW}, and name a folder other than MODEL.stats {BY}"
        )
    statistics = StatisticsFolder(folder)
    weights = statistics.manifest.get("weights")
    if weights is not None and weights != weights_digest(*locate(model, relative_to=relative_to)):
        owner = truncated_repr(statistics.manifest.get("model"), 200).strip("'")
        whose = f"earlier weights of {model}" if owner == model else f"{owner}, not of {model}"
        raise UserError(
            f"{folder}: statistics of {whose}; name those of {model} {BY}, or compute them again "
            f"with `sdjax stats {model} --data FILE`"
        )
    return statistics
