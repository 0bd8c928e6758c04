"""A run's store: every result of a run, kept as soon as it is known.

One folder, one run, one SQLite file (see `schema` for its tables, `database` for its safety). Each
`save_…` is one commit. What is derived (duplicates, accuracies) is computed on reading, so that it
is the same in whatever order, and after however many interruptions, the facts came in.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sdjax.core.errors import UserError
from sdjax.search.database import Database, now, to_json
from sdjax.search.run_tables import RunTables
from sdjax.search.sample_tables import SampleTables
from sdjax.search.score_tables import ScoreTables
from sdjax.search.types import RunRecord


class Store(RunTables, SampleTables, ScoreTables):
    """The typed face of a run's database. A context manager."""

    def __init__(self, database: Database):
        self._db = database

    @classmethod
    def create(
        cls,
        folder: Path,
        *,
        config: Mapping[str, Any],
        versions: Mapping[str, str],
        layers: Sequence[str],
    ) -> "Store":
        """Starts a run in a folder. Raises UserError where there is one already."""
        row = (
            to_json(config),
            fingerprint(config),
            to_json(versions),
            to_json(list(layers)),
            now(),
        )
        statement = (
            "INSERT INTO run (id, config, fingerprint, versions, layers, started_at) "
            "VALUES (1, ?, ?, ?, ?, ?)"
        )
        return cls(Database.create(Path(folder), [(statement, row)]))

    @classmethod
    def open(cls, folder: Path, *, write: bool = False) -> "Store":
        """Opens a folder's run; one writer at a time, readers whenever they like.

        Raises UserError where there is none, or it is damaged, of another version, or taken.
        """
        return cls(Database.open(Path(folder), write=write))

    @classmethod
    def mirror(cls, folder: Path, content: bytes) -> "Store":
        """A store in memory that begins with the `content` of another one, of that folder."""
        return cls(Database.mirror(Path(folder), content))

    def content(self) -> bytes:
        """All that is in the store."""
        return self._db.content()

    def __enter__(self) -> "Store":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._db.close()

    @property
    def folder(self) -> Path:
        return self._db.folder

    def run(self) -> RunRecord:
        rows = self._db.read("SELECT * FROM run")
        if not rows:
            raise UserError(f"{self._db.path}: its table run is empty; start again with --out")
        (row,) = rows
        return RunRecord(
            config=json.loads(row["config"]),
            fingerprint=row["fingerprint"],
            versions=json.loads(row["versions"]),
            layers=tuple(json.loads(row["layers"])),
            started_at=row["started_at"],
            finished_at=row["finished_at"],
        )

    def check_config(self, config: Mapping[str, Any]) -> None:
        """Raises UserError, naming the first key that differs, where the run has another config."""
        kept = self.run()
        if fingerprint(config) == kept.fingerprint:
            return
        mine, theirs = _flat(json.loads(to_json(config))), _flat(kept.config)
        for key in sorted(mine.keys() | theirs.keys()):
            if mine.get(key) != theirs.get(key):
                raise UserError(
                    f"{self.folder}: its run has {key} = {theirs.get(key)!r}, not "
                    f"{mine.get(key)!r}; resume with the run's own config or choose another --out"
                )

    def finish(self) -> None:
        self._db.write("UPDATE run SET finished_at = ? WHERE id = 1", (now(),))


def fingerprint(config: Mapping[str, Any]) -> str:
    """The hash of a config's JSON, by which a resumed run knows its own."""
    text = json.dumps(config, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}.{key}" if prefix else str(key))
    return flat
