"""Files that a training job writes while running: checkpoints, metrics and cached arrays."""

from __future__ import annotations

import hashlib
import io
import json
import logging
import math
import time
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

from sdjax.core.errors import UserError, truncated_repr
from sdjax.core.files import read_bytes, read_text
from sdjax.core.json import parse_json
from sdjax.core.storage_errors import storage_errors
from sdjax.core.versions import version_differences
from sdjax.io.atomic_write import make_folder, write_file
from sdjax.io.links import check_own_folder, member
from sdjax.io.orbax import CheckpointFolder
from sdjax.sharding.multihost import broadcast_from_main, is_main_process

logger = logging.getLogger(__name__)

# Incremented when older checkpoints can no longer be resumed with an identical result.
_FORMAT = 2
_MAX_ARRAY_BYTES = 1_000_000_000  # two numbers per example
_MAX_LOG_BYTES = 1_000_000_000


class TrainingCheckpoints:
    """Periodic checkpoints of trained parameters and optimizer state.

    The position in the data follows from the step, and PRNG keys follow from the config, so the
    result of a resumed job is identical to that of an uninterrupted one.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        job: Mapping[str, Any],
        versions: Mapping[str, str] | None = None,
        accept_versions: bool = False,
    ) -> None:
        """Open the folder, creating it if necessary.

        Args:
            folder: folder of the checkpoints.
            every: steps between checkpoints.
            job: JSON-compatible description of the job; it must be the same when a job resumes.
            versions: versions of packages and fingerprints of inputs, by name; they must be the
                same when a job resumes, unless accepted.
            accept_versions: resume although versions differ, and record the difference.
        """
        self._folder = CheckpointFolder(folder, item="state", unit="step", keep_latest=2)
        self._every = every
        self._job = json.loads(json.dumps(job))
        self._versions = dict(versions or {})
        self._accept_versions = accept_versions
        self._accepted: list[str] = []

    def __enter__(self) -> TrainingCheckpoints:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()

    def restore(self, trainable: Any, opt_state: Any) -> tuple[int, Any, Any]:
        """Return the newest readable step and its state, or 0 and the arguments.

        Raises:
            UserError: the checkpoints belong to another job or were written under other versions,
                or none can be read.
        """
        if not self._folder.numbers():
            return 0, trainable, opt_state
        leaves, structure = jax.tree.flatten((trainable, opt_state))
        saved = self._folder.restore(reference=_numbered(leaves))
        description: Any = saved.description
        kinds = {"job": dict, "versions": dict, "accepted": list}
        if not isinstance(description, dict) or not all(
            isinstance(description.get(key, kind()), kind) for key, kind in kinds.items()
        ):
            raise UserError(
                f"{self._folder.folder}: a checkpoint has an invalid description; remove the folder"
                " to start over"
            )
        if description.get("format") != _FORMAT:
            raise UserError(
                f"{self._folder.folder}: written by another version of sdjax; finish training with "
                "that version, or remove the folder to start over"
            )
        for key, value in self._job.items():
            stored = description.get("job", {}).get(key)
            if stored != value:
                raise UserError(
                    f"{self._folder.folder}: started with {key} = {truncated_repr(stored)}, not "
                    f"{truncated_repr(value)}; resume with the same config, or remove the folder "
                    "to start over"
                )
        self._check_versions(description)
        for number in saved.skipped:
            logger.warning(
                "the checkpoint of step %d is truncated or damaged; resuming from step %d",
                number,
                saved.number,
            )
        restored = [saved.tree[name] for name in _numbered(leaves)]
        return saved.number, *jax.tree.unflatten(structure, restored)

    def _check_versions(self, description: Mapping[str, Any]) -> None:
        """Raise UserError if versions differ from those of a checkpoint and are not accepted."""
        stored = description.get("versions", {})  # sdjax 0.2 stored none
        changes = version_differences(stored, self._versions)
        self._accepted = list(description.get("accepted", []))
        if not changes:
            return
        if not self._accept_versions:
            raise UserError(
                f"{self._folder.folder}: started differently: {', '.join(changes)}; so the result "
                "may differ from that of an uninterrupted job; go back to what it was started "
                "with, or accept this with --accept-versions"
            )
        self._accepted += changes
        logger.warning("resuming with other versions: %s", ", ".join(changes))

    def save(self, step: int, trainable: Any, opt_state: Any, *, last: bool) -> None:
        """Write the state if the step is a multiple of `every` or the last step.

        Raises:
            UserError: the disk is full.
        """
        if step % self._every == 0 or last:
            tree = _numbered(jax.tree.leaves((trainable, opt_state)))
            description = {
                "job": self._job,
                "format": _FORMAT,
                "versions": self._versions,
                "accepted": self._accepted,
            }
            self._folder.save(step, tree, description=description)

    def discard(self, step: int) -> int:
        """Remove the checkpoint of a step; return the newest remaining step, or 0."""
        self._folder.remove(step)
        return max(self._folder.numbers(), default=0)


def _numbered(leaves: list[jax.Array]) -> dict[str, jax.Array]:
    return {f"{number:06}": leaf for number, leaf in enumerate(leaves)}


def cached_array(
    path: Path,
    settings: Mapping[str, Any],
    compute: Callable[[], np.ndarray],
    data: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Return the array in a file, or compute and store it if the file is missing or outdated.

    With several processes, only the main one reads and writes the file.

    Args:
        path: an .npz file, written atomically.
        settings: JSON-compatible values that the result depends on.
        compute: called on all processes if there is no valid file.
        data: arrays that the result depends on.
    """
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for name in sorted(data):
        digest.update(repr((name, data[name].shape, data[name].dtype)).encode())
        digest.update(np.ascontiguousarray(data[name]))
    identity = digest.hexdigest()

    def read() -> bytes:
        file = member(path.parent, path.name)
        return read_bytes(file, _MAX_ARRAY_BYTES) if file.exists() else b""

    stored = broadcast_from_main(read)
    try:
        if _is_uncompressed(stored):
            with np.load(io.BytesIO(stored), allow_pickle=False) as arrays:
                if str(arrays["identity"]) == identity:
                    return arrays["array"]
    except Exception:  # missing, truncated or written by something else: NumPy raises many types
        pass
    array = compute()
    if is_main_process():
        make_folder(path.parent)
        buffer = io.BytesIO()
        np.savez(buffer, identity=identity, array=array)
        write_file(path, buffer.getvalue())
    return array


def _is_uncompressed(content: bytes) -> bool:
    """Return whether a zip file is as large as its contents, as `np.savez` writes it."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        return all(item.compress_type == zipfile.ZIP_STORED for item in archive.infolist())


def _step(line: str) -> float:
    """Return the step of a line of metrics; infinity if it is truncated or something else."""
    try:
        return float(parse_json(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf


class MetricsLog:
    """Log of the metrics of each step, in metrics.jsonl and as TensorBoard events.

    A resumed job first removes the entries of the steps that it will repeat.
    """

    def __init__(self, folder: Path) -> None:
        """Create the log. Raises UserError if the folder is a link or contains one."""
        check_own_folder(folder)
        self._path = folder / "metrics.jsonl"
        self._events: EventsWriter | None = None

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            with storage_errors(self._path):
                self._events.close()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Append the metrics of one step; a no-op except on the main process."""
        if not is_main_process():
            return
        with storage_errors(self._path):
            if self._events is None:
                self._events = self._open_events(step)
            with self._path.open("a", encoding="utf-8") as file:
                print(json.dumps({"step": step, **values}), file=file)
            for name, value in values.items():
                event = Event(wall_time=time.time(), step=step, summary=scalar(name, value))
                self._events.write_event(event)
            self._events.flush()  # so that a killed job loses nothing

    def _open_events(self, step: int) -> EventsWriter:
        make_folder(self._path.parent)
        text = read_text(self._path, _MAX_LOG_BYTES) if self._path.exists() else ""
        kept = [line for line in text.splitlines() if _step(line) < step]
        write_file(self._path, "".join(f"{line}\n" for line in kept))
        folder = self._path.parent / "events"
        make_folder(folder)
        # Not a SummaryWriter, whose thread ends at the first full disk; the next event then waits
        # for it forever.
        events = EventsWriter(str(folder / "events"))
        events.write_event(Event(step=step, session_log=SessionLog(status=SessionLog.START)))
        return events
