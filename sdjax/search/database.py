"""The SQLite file of a run: created atomically, checked when it is opened, with a single writer.

The file uses WAL with synchronous=NORMAL. If the process is killed, no commit is lost. A power
failure may lose the last commits, which a resumed run recomputes, but cannot corrupt the file.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from sdjax.core.errors import TransientError, UserError
from sdjax.core.storage_errors import storage_errors, storage_reason
from sdjax.io.atomic_write import commit, partial_path
from sdjax.io.links import check_own_folder
from sdjax.io.lock import lock_folder
from sdjax.search.attempts import DATABASE_FILE
from sdjax.search.schema_check import damage, journal_of, untrusted

LOCK_FILE = "run.lock"
VERSION = 8  # schema version; sdjax 0.1 used 2, and 0.2 used 3, which lacks some tables
OLDEST_VERSION = 3
_ENDINGS = ("-journal", "-wal", "-shm")  # of files that SQLite writes next to a database

Schema = Callable[[int], str]
"""Returns the CREATE statements of the tables that a version has, with their current columns."""


class Database:
    """A connection to a run's database; a writer also holds the folder's lock."""

    def __init__(self, folder: Path, connection: sqlite3.Connection, lock: FileLock | None) -> None:
        """Wrap an open connection; call `create`, `open` or `mirror` instead."""
        self.folder = folder
        self.path = folder / DATABASE_FILE
        self.version: int = connection.execute("PRAGMA user_version").fetchone()[0]
        self._connection = connection
        self._lock = lock

    @classmethod
    def create(
        cls, folder: Path, schema: Schema, rows: Sequence[tuple[str, tuple[Any, ...]]]
    ) -> Database:
        """Create the folder's database and open it for writing.

        Args:
            folder: the run folder.
            schema: the tables.
            rows: INSERT statement and values of each row to start with.

        Raises:
            UserError: the folder already contains a run, or cannot be written.
        """
        path = folder / DATABASE_FILE
        with contextlib.ExitStack() as stack:
            stack.enter_context(storage_errors(folder))
            folder.mkdir(parents=True, exist_ok=True)
            lock = lock_folder(folder, LOCK_FILE)
            stack.callback(lock.release)
            stack.callback(_remove_unused, folder)
            if path.exists():
                raise UserError(
                    f"{folder}: already contains a run ({DATABASE_FILE}); "
                    f"choose another --out or resume it with --resume {shlex.quote(str(folder))}"
                )
            _create_file(path, schema(VERSION), rows)
            database = cls(folder, _connect(path, schema, write=True), lock)
            stack.pop_all()
        return database

    @classmethod
    def open(
        cls, folder: Path, *, write: bool, schema: Schema, migrations: Mapping[int, str]
    ) -> Database:
        """Open a run's database.

        Args:
            folder: the run folder.
            write: whether to open it for writing, which also updates its schema.
            schema: the tables.
            migrations: statements that lead from one version of the schema to the next.

        Raises:
            UserError: the database is missing, damaged or of another version, the folder contains a
                link, or another process is writing to it (only with `write`).
        """
        path = folder / DATABASE_FILE
        check_own_folder(folder.resolve())
        if not path.is_file():
            raise UserError(
                f"{folder}: not a run folder ({DATABASE_FILE} is missing); pass another folder"
            )
        if (journal := journal_of(path)) is not None:
            raise UserError(
                f"{journal}: a rollback journal, which sdjax does not write but SQLite applies; "
                "remove it if you trust the rest of the folder, or copy the folder again"
            )
        with contextlib.ExitStack() as stack:
            try:
                lock = None
                if write:
                    with storage_errors(folder):
                        lock = lock_folder(folder, LOCK_FILE)
                    stack.callback(lock.release)
                connection = _connect(path, schema, write=write)
                stack.callback(connection.close)
                if write:
                    _migrate(connection, migrations)
                database = cls(folder, connection, lock)
            # SQLite quotes a damaged file in its message, which need not be text.
            except (sqlite3.DatabaseError, OSError, UnicodeError) as error:
                if write and (reason := storage_reason(error)):
                    raise TransientError(f"{path}: {reason} and use --resume again") from error
                raise UserError(
                    f"{path}: cannot be read as a run's database ({error}); "
                    "restore it from a backup, or start over with another --out"
                ) from error
            stack.pop_all()
        return database

    @classmethod
    def mirror(cls, folder: Path, content: bytes, *, schema: Schema) -> Database:
        """Return an in-memory copy of the folder's database; writes stay in memory."""
        connection = sqlite3.connect(":memory:")
        # Bytes 18 and 19 of the header select WAL, which an in-memory database cannot use.
        connection.deserialize(content[:18] + b"\1\1" + content[20:])
        _prepare(connection, folder / DATABASE_FILE, schema, write=False)
        return cls(folder, connection, None)

    def content(self) -> bytes:
        """Return the serialized database, for `mirror`."""
        with self._errors_reported():
            return self._connection.serialize()

    def close(self) -> None:
        """Close the connection and release the lock."""
        self._connection.close()
        if self._lock is not None:
            self._lock.release()

    @contextlib.contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """Run the block as one transaction, rolled back if it raises. Cannot be nested.

        Raises:
            UserError: the disk is full or cannot be written, or the file was removed.
        """
        if self._lock is not None and not self.path.exists():  # SQLite would not notice
            raise UserError(f"{self.path}: was removed while the run was using it; start over")
        with self._errors_reported():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")

    def read(self, query: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        """Return the rows of a query."""
        with self._errors_reported():
            return self._connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def _errors_reported(self) -> Iterator[None]:
        """Convert errors of the disk or the file to UserError; a violated constraint is a bug."""
        try:
            yield
        except (sqlite3.IntegrityError, sqlite3.ProgrammingError):
            raise
        except (sqlite3.DatabaseError, UnicodeError) as error:
            reason = " ".join(str(error).split())[:200]
            remedy = storage_reason(error) or f"{reason}; restore the file from a backup"
            raise TransientError(
                f"{self.path}: committed results are kept, but {remedy} and use --resume"
            ) from error


def is_unused(folder: Path) -> bool:
    """Return whether a folder contains nothing, or only what a run killed at its start has left."""
    partial = partial_path(folder / DATABASE_FILE).name
    leftovers = {LOCK_FILE, partial, *(partial + end for end in _ENDINGS)}
    return {path.name for path in folder.iterdir()} <= leftovers


def _migrate(connection: sqlite3.Connection, migrations: Mapping[int, str]) -> None:
    """Update an older schema in one transaction per version."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    for number in range(version, VERSION):
        connection.executescript(
            f"BEGIN; {migrations[number]} PRAGMA user_version = {number + 1}; COMMIT;"
        )


def now() -> str:
    """Return the current UTC time in ISO 8601 format."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _remove_unused(folder: Path) -> None:
    """Remove the folder of a run that could not be created."""
    with contextlib.suppress(OSError):
        if is_unused(folder):
            shutil.rmtree(folder)


def _create_file(path: Path, schema: str, rows: Sequence[tuple[str, tuple[Any, ...]]]) -> None:
    """Create the file under a temporary name and rename it when it is complete."""
    partial = partial_path(path)
    for end in ("", *_ENDINGS):
        partial.with_name(partial.name + end).unlink(missing_ok=True)
    try:
        with contextlib.closing(sqlite3.connect(partial, isolation_level=None)) as connection:
            # Under its final name the file never has a rollback journal, which `open` refuses.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.executescript(f"BEGIN; {schema} PRAGMA user_version = {VERSION}; COMMIT;")
            for row in rows:
                connection.execute(*row)
        commit(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _connect(path: Path, schema: Schema, *, write: bool) -> sqlite3.Connection:
    uri = path.resolve().as_uri()
    try:
        return _open_uri(f"{uri}?mode={'rw' if write else 'ro'}", path, schema, write=write)
    except sqlite3.OperationalError:
        if write or os.access(path.parent, os.W_OK):
            raise
        # On a read-only file system WAL cannot create its shared memory, but there is no writer.
        return _open_uri(f"{uri}?mode=ro&immutable=1", path, schema, write=write)


def _open_uri(uri: str, path: Path, schema: Schema, *, write: bool) -> sqlite3.Connection:
    connection = sqlite3.connect(uri, uri=True)
    try:
        _prepare(connection, path, schema, write=write)
    except BaseException:
        connection.close()
        raise
    return connection


def _prepare(connection: sqlite3.Connection, path: Path, schema: Schema, *, write: bool) -> None:
    untrusted(connection)
    connection.isolation_level = None  # transactions are explicit
    connection.row_factory = sqlite3.Row
    connection.execute("PRAGMA busy_timeout = 10000")
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version < OLDEST_VERSION:
        raise UserError(
            f"{path}: written by sdjax 0.1, which this version cannot read; use sdjax 0.1 for this "
            "run, or start over with another --out"
        )
    if version > VERSION:
        raise UserError(
            f"{path}: database version {version}, but this sdjax reads version {VERSION}; "
            "use the version of sdjax that wrote it"
        )
    if problem := damage(connection, schema(version), current=version == VERSION):
        raise UserError(
            f"{path}: damaged ({problem}); restore it from a backup, or start over with another "
            "--out"
        )
    if write:
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute("PRAGMA foreign_keys = ON")
