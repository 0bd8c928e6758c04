"""Folders of numbered Orbax checkpoints, each a pytree of arrays and a JSON description.

Each checkpoint is committed by a rename, so a killed process leaves the earlier ones intact.
Damaged checkpoints are skipped and reported.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import shutil
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from sdjax.core.errors import TransientError, UserError
from sdjax.core.files import MAX_TEXT_BYTES, read_bytes
from sdjax.core.json import parse_json
from sdjax.core.storage_errors import storage_errors, storage_reason
from sdjax.io.library_errors import library_errors
from sdjax.io.links import check_own_folder
from sdjax.models.lora import Adapter

_SCORE = "score"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Restored:
    """A restored checkpoint.

    Attributes:
        number: the iteration or step after which it was saved.
        tree: the pytree of arrays.
        description: the JSON description saved with it.
        skipped: newer checkpoints that could not be read, newest first.
    """

    number: int
    tree: Any
    description: dict[str, Any]
    skipped: tuple[int, ...]


class CheckpointFolder:
    """Numbered checkpoints of trees with the same structure; a context manager.

    With several processes, all of them must open it and make the same calls.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        item: str,
        unit: str,
        keep_latest: int,
        keep_best: int = 0,
    ):
        """Open or create a folder of checkpoints.

        Args:
            folder: the folder.
            item: name of the tree in the folder.
            unit: what the numbers count, such as "step".
            keep_latest: number of newest checkpoints to keep.
            keep_best: number of checkpoints with the highest scores to keep in addition.

        Raises:
            UserError: the folder is a link or contains one.
        """
        self.folder = Path(folder).absolute()
        self._item = item
        self._unit = unit
        with storage_errors(self.folder):
            check_own_folder(self.folder)
            _remove_damaged_scores(self.folder)
        policies: list[Any] = [LatestN(keep_latest)]
        if keep_best:
            # With `max_to_keep` and `best_fn` instead, Orbax may delete the newest checkpoint,
            # which a resumed run needs.
            policies.append(BestN(get_metric_fn=_score, n=keep_best))
        logging.getLogger("absl").addFilter(_is_not_raised)
        with (
            library_errors(
                self.folder,
                "the checkpoints cannot be read",
                then="remove the damaged one, or the folder to start from the beginning",
            ),
            storage_errors(self.folder),
        ):
            self._manager = self._open(policies)

    def _open(self, policies: list[Any]) -> ocp.CheckpointManager:
        return ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=_score,  # otherwise Orbax does not write the scores
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
            # A manager that has not saved yet cannot infer the handlers.
            item_handlers={
                self._item: ocp.StandardCheckpointHandler(),
                "description": ocp.JsonCheckpointHandler(),
            },
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the threads of Orbax."""
        self._manager.close()

    def numbers(self) -> tuple[int, ...]:
        """Return the numbers of the existing checkpoints, oldest first."""
        return tuple(sorted(self._manager.all_steps()))

    def save(
        self, number: int, tree: Any, *, description: Mapping[str, Any], score: float = 0.0
    ) -> None:
        """Write a checkpoint and return when it is complete on disk.

        An existing checkpoint with the same number is replaced.

        Args:
            number: 0 or more.
            tree: nested dicts of arrays.
            description: JSON-compatible data.
            score: the best checkpoints are those with the highest score.

        Raises:
            TransientError: the disk is full or cannot be written; earlier checkpoints are intact.
        """
        try:
            self.remove(number)
            with _quiet_threads():
                written = self._manager.save(
                    number,
                    args=ocp.args.Composite(
                        **{self._item: ocp.args.StandardSave(tree)},
                        description=ocp.args.JsonSave(dict(description)),
                    ),
                    metrics={_SCORE: float(score)},
                    force=True,  # otherwise Orbax skips a number below the newest
                )
                self._manager.wait_until_finished()
        except Exception as error:  # Orbax and TensorStore raise many types
            reason = storage_reason(error)
            if reason is None:
                raise
            intact = [other for other in self.numbers() if other != number]
            kept = f"that of {self._unit} {intact[-1]} is intact" if intact else "there is no other"
            raise TransientError(
                f"{self.folder}: the checkpoint of {self._unit} {number} was not written ({kept}): "
                f"{reason} and run the same command again"
            ) from None
        if not written:
            raise RuntimeError(f"Orbax did not write {self.folder / str(number)}")

    def remove(self, number: int) -> None:
        """Remove a checkpoint, if it exists."""
        if number in self._manager.all_steps():
            self._manager.delete(number)

    def restore(self, number: int | None = None, *, reference: Any = None) -> Restored:
        """Read a checkpoint.

        Args:
            number: the checkpoint; by default the newest that can be read.
            reference: nested dicts of arrays or of `jax.ShapeDtypeStruct`s with shardings. Its
                shapes must match, and the arrays get its shardings. By default the arrays are
                placed on the default device.

        Raises:
            UserError: there is no such checkpoint, none can be read, or the shapes differ.
        """
        available = self.numbers()
        if number is not None and number not in available:
            existing = ", ".join(map(str, available)) or "none"
            raise UserError(
                f"{self.folder}: no checkpoint of {self._unit} {number}; available: {existing}"
            )
        candidates = available[::-1] if number is None else (number,)
        if not candidates:
            raise UserError(f"{self.folder}: no checkpoint; start from the beginning")
        skipped: list[int] = []
        cause = ""
        for candidate in candidates:
            try:
                shapes = self._shapes(candidate)
            except Exception as error:  # damaged files raise many types
                skipped.append(candidate)
                cause = _line(error)
                continue
            target = self._target(candidate, shapes, reference)
            try:
                restored = self._manager.restore(
                    candidate,
                    args=ocp.args.Composite(
                        **{self._item: ocp.args.StandardRestore(target)},
                        description=ocp.args.JsonRestore(),
                    ),
                )
                return Restored(
                    number=candidate,
                    tree=restored[self._item],
                    description=restored.description,
                    skipped=tuple(skipped),
                )
            except Exception as error:
                skipped.append(candidate)
                cause = _line(error)
        damaged = ", ".join(str(self.folder / str(other)) for other in skipped)
        others = ", ".join(str(other) for other in available if other not in skipped)
        advice = f"{self._unit}s {others} may be intact" if others else "start from the beginning"
        raise UserError(f"{damaged}: truncated or damaged ({cause}); {advice}")

    def _shapes(self, number: int) -> Any:
        """Return the saved tree of shapes and dtypes."""
        saved = self._manager.item_metadata(number)[self._item]
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), saved.tree)

    def _target(self, number: int, shapes: Any, reference: Any) -> Any:
        if reference is None:
            device = SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
            )
        target = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            reference,
        )
        saved = jax.tree.map(lambda leaf: (tuple(leaf.shape), leaf.dtype), shapes)
        if saved != jax.tree.map(lambda leaf: (tuple(leaf.shape), leaf.dtype), target):
            raise UserError(
                f"{self.folder / str(number)}: projections, rank or shapes differ from those "
                "of this training; use the config that it was trained with"
            )
        return target


class GeneratorCheckpoints(CheckpointFolder):
    """Checkpoints of a run's generator: its adapter after each training, with a score."""

    def __init__(self, folder: str | Path, *, keep_latest: int = 2, keep_best: int = 1):
        """Open or create a folder that keeps the newest and the best checkpoints."""
        super().__init__(
            folder, item="factors", unit="iteration", keep_latest=keep_latest, keep_best=keep_best
        )

    def save_adapter(
        self,
        iteration: int,
        adapter: Adapter,
        *,
        score: float,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint, as `save` does.

        Args:
            iteration: 0 or more.
            adapter: the adapter.
            score: the best checkpoints are those with the highest score.
            metadata: JSON-compatible data.
        """
        description = {"scale": adapter.scale, "metadata": dict(metadata or {})}
        self.save(iteration, adapter.factors, description=description, score=score)

    def restore_adapter(
        self, iteration: int | None = None, *, reference: Adapter | None = None
    ) -> tuple[Adapter, Restored]:
        """Read a checkpoint, as `restore` does.

        Args:
            iteration: the checkpoint; by default the newest that can be read.
            reference: an adapter of arrays or of `jax.ShapeDtypeStruct`s with shardings.

        Returns:
            The adapter in float32, and the checkpoint.
        """
        factors = None if reference is None else reference.factors
        restored = self.restore(iteration, reference=factors)
        description: Any = restored.description
        scale = description.get("scale") if isinstance(description, Mapping) else None
        if isinstance(scale, bool) or not isinstance(scale, int | float):
            raise UserError(
                f"{self.folder / str(restored.number)}: its description has no scale of the "
                "adapter; restore the folder from a backup, or start from the beginning"
            )
        return Adapter(factors=restored.tree, scale=float(scale)), restored


def _remove_damaged_scores(folder: Path) -> None:
    """Remove unreadable scores, since a single one makes Orbax reject the whole folder.

    A checkpoint without a score can be restored.
    """
    if jax.process_index() == 0:
        for path in folder.glob("*/metrics/metrics"):
            try:
                float(parse_json(read_bytes(path, MAX_TEXT_BYTES))[_SCORE])
            except (UserError, ValueError, KeyError, TypeError):
                shutil.rmtree(path.parent)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"scores of {folder}")


@contextlib.contextmanager
def _quiet_threads() -> Iterator[None]:
    """Keep the threads of a failed save from printing tracebacks; the block raises the error.

    Threads of TensorStore may report for a while after the block, so after an error the hook stays.
    """
    outer_hook = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        # Pending writes report to the event loop, which Orbax has closed after the first error.
        if str(unraisable.exc_value) != "Event loop is closed":
            outer_hook(unraisable)

    sys.unraisablehook = hook
    yield
    sys.unraisablehook = outer_hook


def _is_not_raised(record: logging.LogRecord) -> bool:
    """Return whether a log record of Orbax is not about an exception that Orbax also raises."""
    return "_SignalingThread.run() raised" not in record.getMessage()


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[_SCORE]


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
