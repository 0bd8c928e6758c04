"""Tables derived from record classes, and the conversion of their rows.

Each field is a column; a nested dataclass has one column per field. Text, numbers and booleans are
stored directly, tuples of integers as little-endian int32, everything else as JSON. A field that
was `added_later` may be NULL, as it is in the rows of earlier versions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sqlite3
import types
import typing
from collections.abc import Hashable, Iterable, Iterator, Mapping
from functools import cache, cached_property
from typing import Any, Generic, TypeVar

import numpy as np

from sdjax.core.errors import truncated_repr
from sdjax.core.json import parse_json
from sdjax.search.types import ADDED_LATER, storable

T = TypeVar("T")

_SQL_TYPES = {str: "TEXT", int: "INTEGER", bool: "INTEGER", float: "REAL", tuple[int, ...]: "BLOB"}
_STORED_TYPES: dict[Any, Any] = {
    str: str,
    int: int,
    bool: int,
    float: float,
    tuple[int, ...]: bytes,
}
_LARGEST_INTEGER = 2**63 - 1
_LARGEST = {"iteration": 1_000_000, "number": 1_000_000}
_CELLS = {
    type(None): "NULL",
    int: "a whole number",
    float: "a number",
    str: "text",
    bytes: "a blob",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Column:
    """A column.

    Attributes:
        name: its name.
        kind: Python type of its values.
        nullable: whether a cell may be NULL.
        default: value of a cell that is NULL, or that the database lacks.
    """

    name: str
    kind: Any
    nullable: bool
    default: Any = None

    def declaration(self) -> str:
        """Return the column definition for CREATE TABLE."""
        return (
            f"{self.name} {_SQL_TYPES.get(self.kind, 'TEXT')}{'' if self.nullable else ' NOT NULL'}"
        )

    def encode(self, value: Any) -> Any:
        """Convert a value to a SQLite cell.

        Integers are clipped to 64 bits; NaN and infinity become 0.
        """
        if value is None:
            return None
        if self.kind is str:
            return storable(value)
        if self.kind in (int, bool):
            return min(int(value), _LARGEST_INTEGER)
        if self.kind is float:
            return float(value) if math.isfinite(value) else 0.0
        if self.kind == tuple[int, ...]:
            return np.asarray(value, dtype="<i4").tobytes()
        return json.dumps(value, default=str)

    def decode(self, stored: Any) -> Any:
        """Convert a SQLite cell to a value; the inverse of `encode`.

        Raises:
            ValueError: the cell is not what `encode` writes. The message has no subject.
        """
        if stored is None and self.nullable:
            return self.default
        stored_type = _STORED_TYPES.get(self.kind, str)
        if type(stored) is not stored_type:
            found, expected = _CELLS[type(stored)], _CELLS[stored_type]
            raise ValueError(f"is {found}, not {expected}")
        if self.kind is str or (self.kind is float and math.isfinite(stored)):
            return stored
        if self.kind is int and 0 <= stored <= self.largest:
            return stored
        if self.kind is bool and stored in (0, 1):
            return bool(stored)
        if self.kind == tuple[int, ...] and len(stored) % 4 == 0:
            return tuple(np.frombuffer(stored, dtype="<i4").tolist())
        if stored_type is not str:
            raise ValueError(f"has an impossible value ({truncated_repr(stored)})")
        return _check_json(parse_json(stored, non_finite=True), self.kind)

    @property
    def largest(self) -> int:
        """The largest integer that the column may have."""
        return _LARGEST.get(self.name.rpartition("_")[2], _LARGEST_INTEGER)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Generic[T]):
    """The table of a record class.

    Attributes:
        name: table name.
        record: the dataclass of its rows.
        key: columns of the primary key; empty if the table has none.
        order: columns by which rows are read; by default, the order in which they were saved.
        on_conflict: what saving a row with an existing key does: "fail", "ignore" or "update".
        references: foreign keys, as a mapping from column to "table(column)".
        constraints: additional SQL constraints.
        since: first version of the database that has the table.
    """

    name: str
    record: type[T]
    key: tuple[str, ...] = ()
    order: str = "rowid"
    on_conflict: str = "fail"
    references: Mapping[str, str] = dataclasses.field(default_factory=dict)
    constraints: tuple[str, ...] = ()
    since: int = 3

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """The columns in the order of the record's fields."""
        return tuple(_columns(self.record))

    def schema(self) -> str:
        """Return the CREATE TABLE statement."""
        lines = [column.declaration() for column in self.columns]
        if self.key:
            lines.append(f"PRIMARY KEY ({', '.join(self.key)})")
        lines += [
            f"FOREIGN KEY ({column}) REFERENCES {to}" for column, to in self.references.items()
        ]
        return f"CREATE TABLE {self.name} ({', '.join([*lines, *self.constraints])}) STRICT;"

    @cached_property
    def insert(self) -> str:
        """The INSERT statement."""
        statement = f"INSERT INTO {self.name} VALUES ({', '.join('?' * len(self.columns))})"
        if self.on_conflict == "ignore":
            statement += " ON CONFLICT DO NOTHING"
        if self.on_conflict == "update":
            updates = ", ".join(f"{c.name} = excluded.{c.name}" for c in self.columns)
            statement += f" ON CONFLICT ({', '.join(self.key)}) DO UPDATE SET {updates}"
        return statement

    def select(self, names: str = "*", /, **where: Any) -> tuple[str, tuple[Any, ...]]:
        """Return the SELECT statement of the rows whose columns equal `where`, and its values."""
        columns = {column.name: column for column in self.columns}
        condition = " AND ".join(f"{name} = ?" for name in where) or "TRUE"
        values = tuple(columns[name].encode(value) for name, value in where.items())
        return f"SELECT {names} FROM {self.name} WHERE {condition} ORDER BY {self.order}", values

    def encode(self, record: T) -> tuple[Any, ...]:
        """Convert a record to a row."""
        values = _leaves(record)
        return tuple(c.encode(v) for c, v in zip(self.columns, values, strict=True))

    def decode(self, row: sqlite3.Row) -> T:
        """Convert a row to a record; a column that its database lacks has its default.

        Raises:
            ValueError: a cell is not what `encode` writes; the message names table and column.
        """
        return _build(self.record, iter(self.decode_cells(row, self.columns)))

    def decode_cells(self, row: sqlite3.Row, columns: Iterable[Column]) -> list[Any]:
        """Convert cells of a row to values; see `decode`."""
        stored, values = row.keys(), []
        for column in columns:
            try:
                values.append(column.decode(row[column.name] if column.name in stored else None))
            except ValueError as error:
                message = f"table {self.name}, column {column.name}: {error}"
                raise ValueError(message) from None
        return values


def _check_json(value: Any, kind: Any) -> Any:
    """Return a JSON value as a tuple of texts, or as a mapping to texts or to anything."""
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise ValueError("is not a list of texts")
    if not isinstance(value, dict):
        raise ValueError("is not an object")
    if typing.get_args(kind)[1] is str and not all(isinstance(x, str) for x in value.values()):
        raise ValueError("is not an object of texts")
    return value


def _columns(record: type, prefix: str = "") -> Iterator[Column]:
    later = {
        field.name: field.default
        for field in dataclasses.fields(record)
        if ADDED_LATER in field.metadata
    }
    for field, kind in _fields(record):
        name = f"{prefix}{field}"
        if dataclasses.is_dataclass(kind):
            yield from _columns(typing.cast(type, kind), f"{name}_")
            continue
        nullable = isinstance(kind, types.UnionType)
        if nullable:
            (kind,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
        nullable = nullable or field in later
        yield Column(name=name, kind=kind, nullable=nullable, default=later.get(field))


def _leaves(record: Any) -> Iterator[Any]:
    for field in dataclasses.fields(record):
        value = getattr(record, field.name)
        if dataclasses.is_dataclass(value):
            yield from _leaves(value)
        else:
            yield value


def _build(record: Any, cells: Iterator[Any]) -> Any:
    return record(
        **{
            name: _build(kind, cells) if dataclasses.is_dataclass(kind) else next(cells)
            for name, kind in _fields(record)
        }
    )


@cache
def _fields(record: Hashable) -> tuple[tuple[str, Any], ...]:
    """Return name and type of each field."""
    hints = typing.get_type_hints(record)
    return tuple((field.name, hints[field.name]) for field in dataclasses.fields(record))  # type: ignore[arg-type]
