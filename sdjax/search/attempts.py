"""Handling of merges that killed a run, by the next process or the watchdog.

A run saves an `Attempt` before it merges with a program and deletes it afterwards. If one is left,
the process was killed in that merge. A crash or a hang is the program's fault, so the watchdog
(`cli/watchdog.py`) marks the attempt as the last one. Any other death, such as a power failure, may
have nothing to do with the program, which is therefore tried once more.

This module and those that it imports need nothing but the standard library, since the watchdog is a
process without JAX.
"""

import contextlib
import math
import signal
import sqlite3
from pathlib import Path
from typing import Any

from sdjax.core.json import parse_json
from sdjax.sandbox.refusal import COMPILER, Refusal
from sdjax.search.schema_check import foreign_object, journal_of, untrusted

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
    message = "the run crashed, hung or was killed while it compiled or ran this program"
    return Refusal(COMPILER, "interrupted", message)


def pending_attempt(folder: Path) -> tuple[str, str, int] | None:
    """Return entry, setting and number of the merge that is in progress in a run's folder."""
    rows, _ = _execute(folder, "ro", "SELECT entry, setting, number FROM attempt LIMIT 1")
    return rows[0] if rows else None


def attempt_seconds(folder: Path) -> float:
    """Return the time that a merge may take: `sandbox.apply_seconds` of the run's config."""
    rows, _ = _execute(folder, "ro", "SELECT config FROM run LIMIT 1")
    try:
        return float(parse_json(rows[0][0])["sandbox"]["apply_seconds"])
    except (IndexError, KeyError, TypeError, ValueError):
        return math.inf  # no run yet, one of sdjax 0.2, or a damaged one, which the command reports


def make_attempt_the_last(folder: Path) -> bool:
    """Have the program of the pending merge refused; return whether there was one."""
    _, changed = _execute(folder, "rw", "UPDATE attempt SET number = ?", MAX_ATTEMPTS)
    return changed > 0


def _execute(
    folder: Path, mode: str, statement: str, *values: int
) -> tuple[list[tuple[Any, ...]], int]:
    """Return the rows of a statement and how many it changed; none if the run has no database yet.

    Errors of SQLite count as none, and so do views and triggers, which might never end, since the
    command itself reports them.
    """
    path = folder / DATABASE_FILE
    # The command itself reports a link or a journal.
    if path.is_symlink() or not path.is_file() or journal_of(path) is not None:
        return [], 0
    uri = f"{path.resolve().as_uri()}?mode={mode}"
    try:
        with contextlib.closing(sqlite3.connect(uri, uri=True, timeout=10)) as connection:
            untrusted(connection)
            if foreign_object(connection) is not None:
                return [], 0
            cursor = connection.execute(statement, values)
            rows = cursor.fetchall()
            connection.commit()
            return rows, cursor.rowcount
    except (sqlite3.Error, UnicodeError):  # SQLite quotes a damaged file in its message
        return [], 0
