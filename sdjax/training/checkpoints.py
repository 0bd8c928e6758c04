"""What a training leaves behind while it runs: its state, its metrics, and its reference."""

from __future__ import annotations

import hashlib
import io
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from tensorboardX import SummaryWriter

from sdjax.core.errors import UserError
from sdjax.io.atomic_write import write_file
from sdjax.io.orbax import CheckpointFolder
from sdjax.sharding.multihost import broadcast_from_main, is_main_process


class TrainingCheckpoints:
    """Weights, optimiser, step and what else a training depends on, every so many steps.

    The place in the data follows from the step, and the random keys from `origin`, which a resumed
    training must have again: so it goes on as if it had never been interrupted.
    """

    def __init__(
        self,
        folder: Path,
        *,
        every: int,
        last: int,
        origin: Mapping[str, Any],
        say: Callable[[str], None],
    ):
        """last: the last step, which is kept too. origin: what the training was started with and
        must go on with, as JSON holds it. say: gets lines of news."""
        self._folder = CheckpointFolder(folder, item="state", unit="step", keep_latest=2)
        self._every, self._last = every, last
        self._origin = json.loads(json.dumps(origin))
        self._say = say

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.close()

    def restore(self, trainable: Any, state: Any) -> tuple[int, Any, Any]:
        """The newest state that can be read, and its step; 0 and what was given where none is.

        Raises:
            UserError: the checkpoints are of another training, or none of them can be read.
        """
        if not self._folder.numbers():
            return 0, trainable, state
        leaves, structure = jax.tree.flatten((trainable, state))
        found = self._folder.restore(reference=_numbered(leaves))
        for key, value in self._origin.items():
            kept = found.description["origin"].get(key)
            if kept != value:
                raise UserError(
                    f"{self._folder.folder}: begun with {key} = {kept!r}, not {value!r}; go on "
                    "with the same config, or remove the folder to begin anew"
                )
        for number in found.skipped:
            self._say(
                f"the checkpoint of step {number} is cut short or damaged; going on from step "
                f"{found.number}"
            )
        restored = [found.tree[name] for name in _numbered(leaves)]
        return found.number, *jax.tree.unflatten(structure, restored)

    def save(self, step: int, trainable: Any, state: Any) -> None:
        """Writes the state after a step, where that is a multiple of `every`, or the last.

        Raises:
            UserError: the disk is full.
        """
        if step % self._every == 0 or step == self._last:
            tree = _numbered(jax.tree.leaves((trainable, state)))
            self._folder.save(step, tree, description={"origin": self._origin})

    def forget(self, step: int) -> int:
        """Removes what a step has left; the newest step that is kept, 0 where none is."""
        self._folder.remove(step)
        return max(self._folder.numbers(), default=0)


def _numbered(leaves: list[jax.Array]) -> dict[str, jax.Array]:
    return {f"{number:06}": leaf for number, leaf in enumerate(leaves)}


def kept_array(
    path: Path,
    compute: Callable[[], np.ndarray],
    *,
    data: Mapping[str, np.ndarray],
    told: Mapping[str, Any],
) -> np.ndarray:
    """What `compute` returns, or what it returned to a training that was interrupted.

    Args:
        path: where it is kept, whole or not at all.
        data, told: all that it depends on; `told` as JSON holds it.
    """
    digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode())
    for name in sorted(data):
        digest.update(repr((name, data[name].shape, data[name].dtype)).encode())
        digest.update(np.ascontiguousarray(data[name]))
    identity = digest.hexdigest()
    stored = broadcast_from_main(lambda: path.read_bytes() if path.exists() else b"")
    try:
        with np.load(io.BytesIO(stored), allow_pickle=False) as found:
            if str(found["identity"]) == identity:
                return found["array"]
    except (ValueError, KeyError, OSError, EOFError, zipfile.BadZipFile):
        pass  # none, or cut short
    array = compute()
    if is_main_process():
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = io.BytesIO()
        np.savez(whole, identity=identity, array=array)
        write_file(path, whole.getvalue())
    return array


class Metrics:
    """The metrics of each step, in metrics.jsonl and as TensorBoard's events.

    A resumed training takes away what was written of steps that it does again.
    """

    def __init__(self, folder: Path):
        self._path = folder / "metrics.jsonl"
        self._writes = is_main_process()
        self._events: SummaryWriter | None = None
        self._next = 1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._events is not None:
            self._events.close()

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """One line, and one point on each curve."""
        if not self._writes:
            return
        if self._events is None:
            self._begin(step)
        assert self._events is not None
        with self._path.open("a", encoding="utf-8") as file:
            print(json.dumps({"step": step, **values}), file=file)
        for name, value in values.items():
            self._events.add_scalar(name, value, step)
        self._events.flush()  # whatever kills the training, as the lines above

    def _begin(self, step: int) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        lines = self._path.read_text().splitlines() if self._path.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] < step]
        write_file(self._path, "".join(f"{line}\n" for line in kept))
        self._events = SummaryWriter(
            str(self._path.parent / "events"), purge_step=step, write_to_disk=True
        )
