"""The generator's checkpoints: its adapter after each iteration of a run.

Of all that a run writes, the newest and the best by score stay.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from sdjax.io.orbax import CheckpointFolder
from sdjax.models.lora import Adapter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A generator as it was saved.

    Attributes:
        iteration: the iteration after which it was saved.
        adapter: its LoRA factors, float32.
        metadata: what was saved beside it.
        skipped: newer iterations whose checkpoints could not be read, newest first.
    """

    iteration: int
    adapter: Adapter
    metadata: dict[str, Any]
    skipped: tuple[int, ...]


class GeneratorCheckpoints:
    """The folder of a run's generator checkpoints; close it, or use it in a `with`.

    On several processes every one opens it and makes the same calls.
    """

    def __init__(self, folder: str | Path, *, keep_latest: int = 2, keep_best: int = 1):
        self._folder = CheckpointFolder(
            folder, item="factors", unit="iteration", keep_latest=keep_latest, keep_best=keep_best
        )
        self.folder = self._folder.folder

    def __enter__(self) -> GeneratorCheckpoints:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Releases Orbax's threads."""
        self._folder.close()

    def iterations(self) -> tuple[int, ...]:
        """The iterations that have a checkpoint, oldest first."""
        return self._folder.numbers()

    def save(
        self,
        iteration: int,
        adapter: Adapter,
        *,
        score: float,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint, as `CheckpointFolder.save` does.

        Args:
            iteration: 0 or more.
            adapter: what is saved.
            score: by which the best are kept; more is better.
            metadata: anything that JSON holds.
        """
        description = {"scale": adapter.scale, "metadata": dict(metadata or {})}
        self._folder.save(iteration, adapter.factors, description=description, score=score)

    def restore(self, iteration: int | None = None, *, like: Adapter | None = None) -> Restored:
        """Reads the checkpoint of an iteration, or the newest that can be read.

        Args:
            iteration: this one and no other; by default the newest that is whole.
            like: an adapter, of arrays or of `jax.ShapeDtypeStruct`s with shardings, whose shapes
                must agree and whose shardings the factors get; on the default device without.

        Raises:
            UserError: there is no such checkpoint, none can be read, or the shapes disagree.
        """
        found = self._folder.restore(iteration, like=None if like is None else like.factors)
        return Restored(
            iteration=found.number,
            adapter=Adapter(factors=found.tree, scale=found.description["scale"]),
            metadata=found.description["metadata"],
            skipped=found.skipped,
        )
