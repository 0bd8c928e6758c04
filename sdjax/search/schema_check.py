"""Check of a run's database that may come from someone else.

SQLite guarantees types, required values and references, but only those that the file's own schema
declares. It evaluates views, triggers, generated columns and the conditions of columns and indexes,
which may never end or take all memory. Therefore only tables as sdjax declares them are read.

This module needs nothing but the standard library, since the watchdog is a process without JAX.
"""

from __future__ import annotations

import contextlib
import os
import re
import sqlite3
from pathlib import Path

MAX_CELL_BYTES = 32 << 20  # the largest cells are IR, at most `sandbox.ir_bytes`

_NAMES = r"\w+(?:, \w+)*"
_ITEMS = (
    r"\w+ (?:TEXT|INTEGER|REAL|BLOB)(?: NOT NULL)?",
    rf"PRIMARY KEY \({_NAMES}\)",
    rf"FOREIGN KEY \({_NAMES}\) REFERENCES \w+\({_NAMES}\)",
    r"CHECK \(kind IN \('\w+'(?:, '\w+')*\)\)",
    r"CHECK \(chosen_identity <> rejected_identity\)",
)
_ITEM = rf"(?:{'|'.join(_ITEMS)})"
_TABLE = re.compile(rf"CREATE TABLE \w+ \({_ITEM}(?:, {_ITEM})*\) STRICT")


def journal_of(path: Path) -> Path | None:
    """Return the rollback journal of a database, or None without one.

    SQLite would apply it before anything can be checked, and delete a file that it names. A run's
    database never has one, since it uses a write-ahead log from the start.

    Args:
        path: the database.
    """
    journal = path.with_name(f"{path.name}-journal")
    return journal if os.path.lexists(journal) else None


def untrusted(connection: sqlite3.Connection) -> None:
    """Configure a connection for a file from someone else, as SQLite's documentation advises."""
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.execute("PRAGMA mmap_size = 0")
    connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, MAX_CELL_BYTES)


def foreign_object(connection: sqlite3.Connection) -> str | None:
    """Return the kind and name of anything that sdjax would not declare; None without one."""
    for kind, name, text in connection.execute("SELECT type, name, sql FROM sqlite_master"):
        is_index_of_key = kind == "index" and text is None
        if not is_index_of_key and not (kind == "table" and _TABLE.fullmatch(text or "")):
            return f"{kind} {str(name)[:60]!r}"
    return None


def damage(connection: sqlite3.Connection, schema: str, *, current: bool) -> str | None:
    """Return what is wrong with a database; None if nothing is.

    Args:
        connection: a connection to the database.
        schema: CREATE statements of its tables in the current version.
        current: whether the database is of the current version. An earlier one may lack columns
            that may be null, and may have others and further references.
    """
    if (name := foreign_object(connection)) is not None:
        return f"the {name} is not one of a run"
    with contextlib.closing(sqlite3.connect(":memory:")) as reference:
        reference.executescript(schema)
        query = "SELECT name FROM sqlite_master WHERE type = 'table'"
        tables = [table for (table,) in reference.execute(query)]
        for table in tables:
            if problem := _difference(connection, reference, table, current=current):
                return problem
        referenced = {str(row[0]) for table in tables for row in _references(reference, table)}
    # References are looked up in indexes, so that those must agree with their tables. Elsewhere
    # that is not checked, since it takes long.
    for check in ("quick_check(1)", *(f"integrity_check({name})" for name in sorted(referenced))):
        problem = connection.execute(f"PRAGMA {check}").fetchone()[0]
        if problem != "ok":
            return " ".join(str(problem).split())
    broken = connection.execute("PRAGMA foreign_key_check").fetchone()
    if broken is not None:
        return f"a row of the table {broken[0]} refers to one of {broken[2]} that is missing"
    return None


def _difference(
    connection: sqlite3.Connection, reference: sqlite3.Connection, table: str, *, current: bool
) -> str | None:
    """Return how a table differs from that of the reference; None if it does not."""
    declared, found = (_columns(database, table) for database in (reference, connection))
    if not found:
        return f"the table {table} is missing"
    for column, definition in declared.items():
        required = definition[1]
        if column not in found and (current or required):
            return f"the column {column} of the table {table} is missing"
        if found.get(column, definition) != definition:
            return f"the column {column} of the table {table} is declared differently"
    if current and found.keys() != declared.keys():
        return f"the table {table} has other columns"
    own, expected = (
        (_is_strict(database, table), _references(database, table))
        for database in (connection, reference)
    )
    is_same = own == expected if current else own[0] == expected[0] and own[1] >= expected[1]
    if not is_same:
        return f"the table {table} is declared differently"
    return None


def _columns(connection: sqlite3.Connection, table: str) -> dict[str, tuple[object, ...]]:
    """Return the type of each column, and whether it is required, in the key, or computed."""
    rows = connection.execute("SELECT * FROM pragma_table_xinfo(?)", (table,)).fetchall()
    return {row[1]: (row[2], row[3], row[5], row[6]) for row in rows}


def _is_strict(connection: sqlite3.Connection, table: str) -> bool:
    query = "SELECT strict FROM pragma_table_list(?) WHERE schema = 'main'"
    return bool(connection.execute(query, (table,)).fetchone()[0])


def _references(connection: sqlite3.Connection, table: str) -> set[tuple[object, ...]]:
    """Return (table, column, column there) of each foreign key."""
    rows = connection.execute("SELECT * FROM pragma_foreign_key_list(?)", (table,))
    return {(row[2], row[3], row[4]) for row in rows}
