"""The generator's checkpoints: its adapter after each iteration, written with Orbax.

Of all that a run writes, the newest and the best by score stay. Each is committed by a rename, so
that a killed process leaves the earlier ones whole.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from jax.sharding import SingleDeviceSharding
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from sdjax.errors import UserError
from sdjax.models.adapter import Adapter

_SCORE = "score"


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
        self.folder = Path(folder).absolute()
        _drop_damaged_scores(self.folder)
        policies = [LatestN(keep_latest)]
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
                "factors": ocp.StandardCheckpointHandler(),
                "description": ocp.JsonCheckpointHandler(),
            },
        )

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
        self._manager.close()

    def iterations(self) -> tuple[int, ...]:
        """The iterations that have a checkpoint, oldest first."""
        return tuple(sorted(self._manager.all_steps()))

    def save(
        self,
        iteration: int,
        adapter: Adapter,
        *,
        score: float,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Writes a checkpoint and returns when it is whole on disk.

        One that the same iteration left, before it was interrupted, is replaced.

        Args:
            iteration: 0 or more.
            adapter: what is saved.
            score: by which the best are kept; more is better.
            metadata: anything that JSON holds.
        """
        if iteration in self._manager.all_steps():
            self._manager.delete(iteration)
        description = {"scale": adapter.scale, "metadata": dict(metadata or {})}
        written = self._manager.save(
            iteration,
            args=ocp.args.Composite(
                factors=ocp.args.StandardSave(adapter.factors),
                description=ocp.args.JsonSave(description),
            ),
            metrics={_SCORE: float(score)},
            force=True,  # Orbax passes over an iteration that is not newer than the newest
        )
        self._manager.wait_until_finished()
        if not written:
            raise RuntimeError(f"Orbax did not write {self.folder / str(iteration)}")

    def restore(self, iteration: int | None = None, *, like: Adapter | None = None) -> Restored:
        """Reads the checkpoint of an iteration, or the newest that can be read.

        Args:
            iteration: this one and no other; by default the newest, and where that is damaged the
                one before it, with the damaged named in `skipped`.
            like: an adapter, of arrays or of `jax.ShapeDtypeStruct`s with shardings, whose shapes
                must agree and whose shardings the factors get; on the default device without.

        Raises:
            UserError: there is no such checkpoint, none can be read, or the shapes disagree.
        """
        available = self.iterations()
        if iteration is not None and iteration not in available:
            there = ", ".join(map(str, available)) or "none"
            raise UserError(
                f"{self.folder}: no checkpoint of iteration {iteration}; there are: {there}"
            )
        candidates = available[::-1] if iteration is None else (iteration,)
        if not candidates:
            raise UserError(f"{self.folder}: no generator checkpoint; start the run anew")
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
                        factors=ocp.args.StandardRestore(target),
                        description=ocp.args.JsonRestore(),
                    ),
                )
                return Restored(
                    iteration=candidate,
                    adapter=Adapter(factors=found.factors, scale=found.description["scale"]),
                    metadata=found.description["metadata"],
                    skipped=tuple(skipped),
                )
            except Exception as error:
                skipped.append(candidate)
                cause = _line(error)
        damaged = ", ".join(str(self.folder / str(number)) for number in skipped)
        others = [str(number) for number in available if number not in skipped]
        advice = f"iterations {', '.join(others)} may be whole" if others else "start the run anew"
        raise UserError(f"{damaged}: cut short or damaged, cannot be read ({cause}); {advice}")

    def _shapes(self, iteration: int) -> Any:
        """The tree of shapes and dtypes as saved."""
        found = self._manager.item_metadata(iteration).factors
        return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), found.tree)

    def _target(self, iteration: int, shapes: Any, like: Adapter | None) -> Any:
        if like is None:
            device = SingleDeviceSharding(jax.local_devices()[0])
            return jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), shapes
            )
        wanted = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding),
            like.factors,
        )
        plain = jax.tree.map(lambda leaf: (tuple(leaf.shape), leaf.dtype), shapes)
        if plain != jax.tree.map(lambda leaf: (tuple(leaf.shape), leaf.dtype), wanted):
            raise UserError(
                f"{self.folder / str(iteration)}: the saved adapter has other projections, rank or "
                "shapes than this run's; use the config that it was trained with"
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


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
