"""The SQLite file of a run: created whole or not at all, checked on opening, with one writer.

WAL with synchronous=NORMAL: a process killed at any point loses nothing that was committed; a
power cut may lose the last commits, which a resumed run does again, and never tears the file.
"""

import contextlib
import json
import os
import sqlite3
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from sdjax.core.errors import UserError
from sdjax.io.atomic_write import commit, partial_path
from sdjax.io.lock import lock_folder
from sdjax.search.schema import SCHEMA, VERSION

FILE = "run.sqlite"
LOCK = "run.lock"


class Database:
    """A connection, and for a writer the folder's lock, which the system frees on any death."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: FileLock | None):
        self.folder = folder
        self.path = folder / FILE
        self._connection = connection
        self._lock = lock

    @classmethod
    def create(cls, folder: Path, first: Sequence[tuple[str, tuple]]) -> "Database":
        """Makes the folder's database with the rows of `first` in it, and opens it for writing.

        Raises UserError where the folder holds a run already or cannot be written.
        """
        path = folder / FILE
        lock = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder, LOCK)
            if path.exists():
                raise UserError(
                    f"{folder}: holds another run ({FILE}); "
                    f"choose another --out, or go on with it by --resume {folder}"
                )
            _build(path, first)
            return cls(folder, _connect(path, write=True), lock)
        except BaseException as error:
            if lock is not None:
                lock.release()
            if isinstance(error, OSError | sqlite3.OperationalError):
                raise UserError(
                    f"{folder}: cannot write there ({error}); choose another --out"
                ) from error
            raise

    @classmethod
    def open(cls, folder: Path, *, write: bool) -> "Database":
        """Opens a run's database. Raises UserError where there is none, or it is of another
        version, damaged, or being written by another process (`write` only).
        """
        path = folder / FILE
        if not path.is_file():
            raise UserError(f"{folder}: no run here ({FILE} is missing); give the folder of a run")
        lock = None
        try:
            lock = lock_folder(folder, LOCK) if write else None
            return cls(folder, _connect(path, write=write), lock)
        except (sqlite3.DatabaseError, OSError) as error:
            if lock is not None:
                lock.release()
            raise UserError(
                f"{path}: cannot be read as a run's database ({error}); "
                "restore it from a copy or start again with another --out"
            ) from error
        except UserError:
            if lock is not None:
                lock.release()
            raise

    @classmethod
    def mirror(cls, folder: Path, content: bytes) -> "Database":
        """A database in memory with the content of the folder's; what is written stays there."""
        connection = sqlite3.connect(":memory:")
        # Bytes 18 and 19 of the header say WAL, which SQLite refuses to have in memory.
        connection.deserialize(content[:18] + b"\1\1" + content[20:])
        _prepare(connection, folder / FILE, write=False)
        return cls(folder, connection, None)

    def content(self) -> bytes:
        """The whole database, as `mirror` takes it."""
        with self._reported():
            return self._connection.serialize()

    def close(self) -> None:
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """One commit; nothing of it stays when the block raises. Not nested."""
        with self._reported():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def write(self, statement: str, *rows: tuple[Any, ...]) -> None:
        """Runs one statement for each row, in one commit."""
        with self.transaction() as connection:
            connection.executemany(statement, rows)

    def read(self, query: str, row: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with self._reported():
            return self._connection.execute(query, row).fetchall()

    @contextlib.contextmanager
    def _reported(self) -> Iterator[None]:
        """A full disk or a damaged file is the user's to mend; a broken constraint is a bug."""
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except sqlite3.DatabaseError as error:
            raise UserError(
                f"{self.path}: {error}; what was committed before is kept: "
                "mend the disk or the file, then --resume"
            ) from error


def _build(path: Path, first: Sequence[tuple[str, tuple]]) -> None:
    """Makes the file under another name and renames it when whole: a kill leaves no half run."""
    draft = partial_path(path)
    draft.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(draft, isolation_level=None)) as connection:
        connection.executescript(f"BEGIN; {SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        for statement, row in first:
            connection.execute(statement, row)
    commit(draft, path)


def _connect(path: Path, *, write: bool) -> sqlite3.Connection:
    target = path.resolve().as_uri()
    connection = sqlite3.connect(f"{target}?mode={'rw' if write else 'ro'}", uri=True)
    try:
        _prepare(connection, path, write)
    except sqlite3.OperationalError:
        connection.close()
        if write or os.access(path.parent, os.W_OK):
            raise
        # On a read-only medium WAL cannot make its shared memory; nobody can write there either.
        connection = sqlite3.connect(f"{target}?mode=ro&immutable=1", uri=True)
        _prepare(connection, path, write)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, write: bool) -> None:
    connection.isolation_level = None  # transactions are begun by hand
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA busy_timeout = 10000")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version != VERSION:
        raise UserError(
            f"{path}: version {version} of a run's database, this sdjax reads version {VERSION}; "
            "use the sdjax that wrote it"
        )
    damage = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
    if damage != "ok":
        raise UserError(
            f"{path}: is damaged ({' '.join(damage.split())}); "
            "restore it from a copy or start again with another --out"
        )
    if write:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")


def to_json(value: Any) -> str:
    """JSON for a column, keys in the order they have."""
    return json.dumps(value, default=str)


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
