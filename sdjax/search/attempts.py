"""Merges that killed a run: what the next process, or the watchdog, does about them.

A run saves an `Attempt` before it merges with a program and deletes it afterwards. If one is left,
the process was killed in that merge. A crash or a hang is the program's fault, so the watchdog
(`cli/watchdog.py`) marks the attempt as the last one. Any other death, such as a power failure, may
have nothing to do with the program, which is therefore tried once more.

This module imports nothing but the standard library and `Refusal`, since the watchdog is a process
without JAX.
"""

import contextlib
import json
import signal
import sqlite3
from collections.abc import Iterator
from pathlib import Path

from sdjax.sandbox.refusal import COMPILER, Refusal

MAX_ATTEMPTS = 2
# Signals by which a process ends that made a mistake, not ones that another process sends.
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGILL, signal.SIGFPE)

DATABASE_FILE = "run.sqlite"


def too_many_attempts(number: int) -> Refusal | None:
    """Return the refusal of a program in whose merge a process was killed too often.

    Args:
        number: number of the attempt that is about to begin.
    """
    if number <= MAX_ATTEMPTS:
        return None
    message = "the run crashed, hung or was killed twice while it compiled or ran this program"
    return Refusal(COMPILER, "interrupted", message)


def pending_attempt(folder: Path) -> tuple[str, str, int] | None:
    """Return entry, setting and number of the merge that is in progress in a run's folder."""
    with _database(folder, "ro") as connection:
        query = "SELECT entry, setting, number FROM attempt"
        return connection.execute(query).fetchone() if connection else None
    return None


def attempt_seconds(folder: Path) -> float:
    """Return the time that a merge may take: `sandbox.apply_seconds` of the run's config."""
    with _database(folder, "ro") as connection:
        if connection:
            (config,) = connection.execute("SELECT config FROM run").fetchone()
            return float(json.loads(config)["sandbox"]["apply_seconds"])
    return float("inf")


def make_attempt_the_last(folder: Path) -> bool:
    """Have the program of the pending merge refused; return whether there was one."""
    changed = 0
    with _database(folder, "rw") as connection:
        if connection:
            statement = "UPDATE attempt SET number = ?"
            changed = connection.execute(statement, (MAX_ATTEMPTS,)).rowcount
            connection.commit()
    return changed > 0


@contextlib.contextmanager
def _database(folder: Path, mode: str) -> Iterator[sqlite3.Connection | None]:
    """Open a run's database; None, and no error in the block, if it cannot be read (yet)."""
    path = folder / DATABASE_FILE
    if path.is_symlink() or not path.is_file():  # the command itself reports a link
        yield None
        return
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    try:
        connection = sqlite3.connect(uri, uri=True, timeout=10)
    except sqlite3.Error:
        yield None
        return
    try:
        yield connection
    except (sqlite3.Error, ValueError, KeyError, TypeError):
        pass
    finally:
        connection.close()
