"""A folder of numbered Orbax checkpoints, each a pytree of arrays and a description in JSON.

Each is committed by a rename, so that a killed process leaves the earlier ones whole; one that is
damaged is passed over, and said to be.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from sdjax.core.errors import UserError

_SCORE = "score"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Saved:
    """A checkpoint as it was saved.

    Attributes:
        number: of the iteration or step after which it was saved.
        tree: the pytree of arrays.
        description: what was saved beside it.
        skipped: newer checkpoints that could not be read, newest first.
    """

    number: int
    tree: Any
    description: dict[str, Any]
    skipped: tuple[int, ...]


class CheckpointFolder:
    """Numbered checkpoints of trees of one kind; close it, or use it in a `with`.

    On several processes every one opens it and makes the same calls.
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
        """item: the tree's name in the folder; unit: what the numbers count, such as "step"."""
        self.folder = Path(folder).absolute()
        self._item = item
        self._unit = unit
        _drop_damaged_scores(self.folder)
        policies: list[Any] = [LatestN(keep_latest)]
        if keep_best:
            # Ascending, of which the last ones stay; with `max_to_keep` and `best_fn` instead,
            # Orbax may delete the newest, which a resumed run needs.
            policies.append(BestN(get_metric_fn=_score, n=keep_best))
        self._manager = ocp.CheckpointManager(
            self.folder,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=AnyPreservationPolicy(policies),
                best_fn=_score,  # without it Orbax does not write the scores to disk
                cleanup_tmp_directories=True,
                enable_async_checkpointing=False,
            ),
            # Named here, since a manager that has not saved yet cannot tell what an item is.
            item_handlers={
                item: ocp.StandardCheckpointHandler(),
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
        """Releases Orbax's threads."""
        self._manager.close()

    def numbers(self) -> tuple[int, ...]:
        """Those that have a checkpoint, oldest first."""
        return tuple(sorted(self._manager.all_steps()))

    def save(
        self, number: int, tree: Any, *, description: Mapping[str, Any], score: float = 0.0
    ) -> None:
        """Writes a checkpoint and returns when it is whole on disk.

        One that the same number left, before it was interrupted, is replaced.

        Args:
            number: 0 or more.
            tree: nested dicts of arrays.
            description: anything that JSON holds.
            score: by which the best are kept; more is better.

        Raises:
            UserError: the disk is full; the earlier checkpoints are whole.
        """
        self.remove(number)
        try:
            written = self._manager.save(
                number,
                args=ocp.args.Composite(
                    **{self._item: ocp.args.StandardSave(tree)},
                    description=ocp.args.JsonSave(dict(description)),
                ),
                metrics={_SCORE: float(score)},
                force=True,  # Orbax passes over a number that is not newer than the newest
            )
            self._manager.wait_until_finished()
        except Exception as error:  # whatever Orbax and TensorStore raise on files
            if not is_full(error):
                raise
            whole = [str(one) for one in self.numbers() if one != number]
            kept = f"that of {self._unit} {whole[-1]} is whole" if whole else "there is no other"
            raise UserError(
                f"{self.folder}: the disk is full, the checkpoint of {self._unit} {number} is not "
                f"written ({kept}); free some space and start the same command again"
            ) from None
        if not written:
            raise RuntimeError(f"Orbax did not write {self.folder / str(number)}")

    def remove(self, number: int) -> None:
        """Removes the checkpoint of a number, if there is one."""
        if number in self._manager.all_steps():
            self._manager.delete(number)

    def restore(self, number: int | None = None, *, like: Any = None) -> Saved:
        """Reads a checkpoint, or the newest that can be read.

        Args:
            number: this one and no other; by default the newest, and where that is damaged the
                one before it, with the damaged named in `skipped`.
            like: nested dicts of arrays or of `jax.ShapeDtypeStruct`s with shardings, whose shapes
                must agree and whose shardings the arrays get; on the default device without.

        Raises:
            UserError: there is no such checkpoint, none can be read, or the shapes disagree.
        """
        available = self.numbers()
        if number is not None and number not in available:
            there = ", ".join(map(str, available)) or "none"
            raise UserError(
                f"{self.folder}: no checkpoint of {self._unit} {number}; there are: {there}"
            )
        candidates = available[::-1] if number is None else (number,)
        if not candidates:
            raise UserError(f"{self.folder}: no checkpoint; start anew")
        skipped: list[int] = []
        cause = ""
        for candidate in candidates:
            try:
                shapes = self._shapes(candidate)
            except Exception as error:  # whatever Orbax and TensorStore raise on damaged files
                skipped.append(candidate)
                cause = _line(error)
                continue
            target = self._target(candidate, shapes, like)
            try:
                found = self._manager.restore(
                    candidate,
                    args=ocp.args.Composite(
                        **{self._item: ocp.args.StandardRestore(target)},
                        description=ocp.args.JsonRestore(),
                    ),
                )
                return Saved(
                    number=candidate,
                    tree=found[self._item],
                    description=found.description,
                    skipped=tuple(skipped),
                )
            except Exception as error:
                skipped.append(candidate)
                cause = _line(error)
        damaged = ", ".join(str(self.folder / str(one)) for one in skipped)
        others = [str(one) for one in available if one not in skipped]
        advice = f"{self._unit}s {', '.join(others)} may be whole" if others else "start anew"
        raise UserError(f"{damaged}: cut short or damaged, cannot be read ({cause}); {advice}")

    def _shapes(self, number: int) -> Any:
        """The tree of shapes and dtypes as saved."""
        found = self._manager.item_metadata(number)[self._item]
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found.tree)

    def _target(self, number: int, shapes: Any, like: Any) -> Any:
        if like is None:
            device = SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
            )
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding), like
        )
        plain = jax.tree.map(lambda leaf: (tuple(leaf.shape), leaf.dtype), shapes)
        if plain != jax.tree.map(lambda leaf: (tuple(leaf.shape), leaf.dtype), wanted):
            raise UserError(
                f"{self.folder / str(number)}: what was saved has other projections, rank or "
                "shapes than what is trained here; use the config that it was trained with"
            )
        return wanted


def _drop_damaged_scores(folder: Path) -> None:
    """Takes away scores that cannot be parsed: Orbax would refuse the whole folder for one.

    A checkpoint without a score is kept, and can be restored.
    """
    if jax.process_index() == 0:
        for path in folder.glob("*/metrics/metrics"):
            try:
                float(json.loads(path.read_text())[_SCORE])
            except (ValueError, KeyError, TypeError):
                shutil.rmtree(path.parent)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"scores of {folder}")


def _score(metrics: Mapping[str, float]) -> float:
    return metrics[_SCORE]


def is_full(error: BaseException) -> bool:
    """Whether the disk is full, or a quota or the largest size of a file is reached."""
    reasons = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError) and error.errno in reasons:
        return True
    return any(os.strerror(reason) in str(error) for reason in reasons)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
