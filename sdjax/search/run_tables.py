"""A run's settings, lineage, checkpoints and phases."""

import json

from sdjax.search.database import Database, now, to_json
from sdjax.search.types import Checkpoint, Lineage, Setting


class RunTables:
    """Tables setting, lineage, checkpoint and phase."""

    _db: Database

    def save_setting(self, setting: Setting) -> None:
        """Keeps a setting. Raises ValueError where one of that name is another."""
        self._db.write(
            "INSERT INTO setting VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (setting.name, setting.seed, to_json(setting.slots), setting.scope, setting.task),
        )
        if setting not in self.settings():
            raise ValueError(f"setting {setting.name!r} is another in {self._db.path}")

    def settings(self) -> tuple[Setting, ...]:
        return tuple(
            Setting(**{**dict(row), "slots": json.loads(row["slots"])})
            for row in self._db.read("SELECT * FROM setting ORDER BY rowid")
        )

    def save_lineage(self, lineage: Lineage) -> None:
        self._db.write(
            "INSERT OR REPLACE INTO lineage VALUES (?, ?, ?, ?, ?)",
            (
                lineage.iteration,
                lineage.setting,
                lineage.generator,
                lineage.checkpoint,
                lineage.temperature,
            ),
        )

    def lineage(self) -> tuple[Lineage, ...]:
        rows = self._db.read("SELECT * FROM lineage ORDER BY iteration")
        return tuple(Lineage(**dict(row)) for row in rows)

    def save_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Records a checkpoint, after its files are whole."""
        self._db.write(
            "INSERT INTO checkpoint VALUES (?, ?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
            "iteration = excluded.iteration, role = excluded.role, path = excluded.path, "
            "detail = excluded.detail, saved_at = excluded.saved_at",
            (
                checkpoint.name,
                checkpoint.iteration,
                checkpoint.role,
                checkpoint.path,
                to_json(checkpoint.detail),
                now(),
            ),
        )

    def checkpoints(self) -> tuple[Checkpoint, ...]:
        rows = self._db.read(
            "SELECT name, iteration, role, path, detail FROM checkpoint ORDER BY iteration, name"
        )
        return tuple(
            Checkpoint(**{**dict(row), "detail": json.loads(row["detail"])}) for row in rows
        )

    def save_phase(self, iteration: int, name: str, seconds: float) -> None:
        """Marks a phase of an iteration as done; a resumed run passes it over."""
        self._db.write(
            "INSERT OR REPLACE INTO phase VALUES (?, ?, ?, ?)", (iteration, name, seconds, now())
        )

    def phases(self) -> dict[tuple[int, str], float]:
        """(iteration, name) -> seconds of each phase that is done, in the order they ended."""
        rows = self._db.read("SELECT * FROM phase ORDER BY finished_at, rowid")
        return {(row["iteration"], row["name"]): row["seconds"] for row in rows}
