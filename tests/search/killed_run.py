"""A process that runs a search and reports its progress; `test_killed_run.py` kills it.

    python killed_run.py CONFIG FOLDER MOMENT

CONFIG is JSON. The process appends to two files next to the folder: one byte to `FOLDER.moments` at
each moment, before and within each write to the database, and before each training step, gradient
step and checkpoint; and the number of problems to `FOLDER.answers` before they are answered. When
there have been more than MOMENT moments, it prints a line and waits to be killed, though it keeps
running. It is never killed twice in the same merge, because a search refuses a program whose merge
has ended two processes.
"""

import contextlib
import functools
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from sdjax.search import loop, refinement, scoring, structure_search
from sdjax.search.attempts import pending_attempt
from sdjax.search.config import config_from
from sdjax.search.database import Database
from sdjax.tuning import candidates
from sdjax.tuning.loss import MergeLoss


class Progress:
    """The files of a run's progress, and whether it has reached its moment."""

    def __init__(self, folder: Path, moment: int) -> None:
        self._folder, self._moment, self._reported = folder, moment, False
        self._left_over = pending_attempt(folder)
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND
        self._moments = os.open(f"{folder}.moments", flags)
        self._answers = os.open(f"{folder}.answers", flags)

    def record(self) -> None:
        """Record a moment; report that it is time to kill the process."""
        os.write(self._moments, b".")
        if self._reported or os.fstat(self._moments).st_size <= self._moment:
            return
        if self._left_over is not None and pending_attempt(self._folder) is not None:
            return
        self._left_over, self._reported = None, True
        print("now", flush=True)

    def before(self, function: Callable) -> Callable:
        """Return a function that records a moment before each call."""

        def recorded(*arguments: Any, **options: Any) -> Any:
            self.record()
            return function(*arguments, **options)

        return recorded

    def answering(self, evaluate: Callable) -> Callable:
        """Return a function that records how many problems are answered."""

        def recorded(*arguments: Any, **options: Any) -> Any:
            os.write(self._answers, f"{len(arguments[4])}\n".encode())
            return evaluate(*arguments, **options)

        return recorded

    def writing(self, transaction: Callable) -> Callable:
        """Return a transaction that records a moment before it, and one before its commit."""

        @contextlib.contextmanager
        def recorded(database: Database) -> Iterator[Any]:
            self.record()
            with transaction(database) as connection:
                yield connection
                self.record()

        return recorded


def main(config: str, folder: str, moment: str) -> None:
    """Run the search."""
    progress = Progress(Path(folder), int(moment))
    Database.transaction = progress.writing(Database.transaction)  # type: ignore[method-assign]
    MergeLoss.__call__ = progress.before(MergeLoss.__call__)  # type: ignore[method-assign]
    saves = loop.GeneratorCheckpoints
    saves.save_adapter = progress.before(saves.save_adapter)  # type: ignore[method-assign]
    step = progress.before(lambda *_: None)
    train = functools.partial(refinement.train_dpo, on_step=step)
    refinement.train_dpo = train  # type: ignore[assignment]
    train = progress.before(refinement.train_policy_gradient)
    refinement.train_policy_gradient = train
    for module in (scoring, structure_search, candidates):
        module.evaluate_problems = progress.answering(module.evaluate_problems)
    loop.run_search(config_from(json.loads(config), "test"), folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
