"""A run's prompts, samples, verdicts and programs."""

import json
import sqlite3
from collections.abc import Iterable, Sequence

import numpy as np

from sdjax.search.database import Database, to_json
from sdjax.search.types import (
    SEARCH,
    JudgedSample,
    Program,
    Sample,
    StoredVerdict,
    VerdictLike,
    storable,
    text_hash,
)

ADMISSIBLE = ("admitted", "duplicate")


class SampleTables:
    """Tables prompt, sample, verdict and program."""

    _db: Database

    def save_prompt(self, name: str, text: str) -> str:
        """Keeps a prompt and returns its hash."""
        digest = text_hash(text)
        self._db.write(
            "INSERT INTO prompt VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
            (digest, name, storable(text)),
        )
        return digest

    def prompts(self) -> dict[str, str]:
        """Hash -> text."""
        return {row["hash"]: row["text"] for row in self._db.read("SELECT * FROM prompt")}

    def save_samples(self, samples: Iterable[Sample]) -> None:
        """Keeps samples, all or none. Raises sqlite3.IntegrityError where one is there already."""
        self._db.write(
            "INSERT INTO sample VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            *[
                (
                    sample.purpose,
                    sample.iteration,
                    sample.number,
                    sample.prompt,
                    storable(sample.text),
                    np.asarray(sample.tokens, dtype="<i4").tobytes(),
                    int(sample.stopped),
                    None if sample.source is None else text_hash(sample.source),
                )
                for sample in samples
            ],
        )

    def sample_numbers(self, iteration: int, purpose: str = SEARCH) -> set[int]:
        """The numbers of the samples that an iteration has already."""
        rows = self._db.read(
            "SELECT number FROM sample WHERE purpose = ? AND iteration = ?", (purpose, iteration)
        )
        return {row["number"] for row in rows}

    def save_verdict(self, source: str, verdict: VerdictLike, layers: Sequence[str] = ()) -> None:
        """Keeps the first verdict on a source text, and its program if it is admissible."""
        text = storable(source)
        row = (
            text_hash(source),
            text,
            verdict.verdict,
            verdict.rule,
            storable(verdict.message),
            verdict.identity,
            verdict.structure,
            verdict.fingerprint,
            verdict.form,
            to_json(list(verdict.requests)),
            verdict.ir,
            to_json(list(verdict.notes)),
            _bounded(verdict.cost),
            _bounded(verdict.memory),
            to_json(list(layers)),
        )
        with self._db.transaction() as connection:
            connection.execute(
                f"INSERT INTO verdict VALUES ({', '.join('?' * len(row))}) ON CONFLICT DO NOTHING",
                row,
            )
            if verdict.verdict in ADMISSIBLE and verdict.identity is not None:
                connection.execute(
                    "INSERT INTO program (identity, source, fingerprint) VALUES (?, ?, ?) "
                    "ON CONFLICT DO NOTHING",
                    (verdict.identity, text, verdict.fingerprint),
                )

    def verdict_of(self, source: str) -> StoredVerdict | None:
        """The verdict on a source text, or None where it was not judged yet."""
        rows = self._db.read("SELECT * FROM verdict WHERE source_hash = ?", (text_hash(source),))
        return _verdict(rows[0]) if rows else None

    def verdicts(self) -> dict[str, StoredVerdict]:
        """Source hash -> verdict, of all texts that were judged."""
        rows = self._db.read("SELECT * FROM verdict ORDER BY rowid")
        return {row["source_hash"]: _verdict(row) for row in rows}

    def ir_of(self, identity: str) -> str:
        """The verified program of an identity. Raises KeyError where there is none."""
        rows = self._db.read(
            "SELECT wire FROM verdict WHERE identity = ? AND wire IS NOT NULL ORDER BY rowid",
            (identity,),
        )
        if not rows:
            raise KeyError(identity)
        return rows[0]["wire"]

    def judged(self, iteration: int | None = None, purpose: str = SEARCH) -> list[JudgedSample]:
        """The samples of a purpose, in order, with what became of each.

        A program is admitted at its first sample over the whole purpose and a duplicate after;
        so the verdicts on their texts may be given in any order, and without regard to others.
        """
        rows = self._db.read(
            """
            SELECT s.iteration, s.number, s.prompt, s.text, s.tokens, s.stopped, s.source_hash,
                   v.verdict, v.rule, v.identity, p.fingerprint,
                   a.verdict AS applied, a.rule AS applied_rule
            FROM sample s
            LEFT JOIN verdict v ON v.source_hash = s.source_hash
            LEFT JOIN program p ON p.identity = v.identity
            LEFT JOIN lineage l ON l.iteration = s.iteration
            LEFT JOIN candidate c ON c.identity = v.identity AND c.kind = 'program'
            LEFT JOIN application a ON a.candidate = c.name
                 AND a.setting = coalesce(l.setting, 'main')
            WHERE s.purpose = ? ORDER BY s.iteration, s.number
            """,
            (purpose,),
        )
        seen: dict[str, str] = {}
        samples = []
        for row in rows:
            status, rule, identity = _status(row, seen)
            if iteration is None or row["iteration"] == iteration:
                samples.append(
                    JudgedSample(
                        iteration=row["iteration"],
                        number=row["number"],
                        prompt=row["prompt"],
                        text=row["text"],
                        tokens=tuple(np.frombuffer(row["tokens"], dtype="<i4").tolist()),
                        stopped=bool(row["stopped"]),
                        source_hash=row["source_hash"],
                        status=status,
                        rule=rule,
                        identity=identity,
                    )
                )
        return samples

    def save_origin(
        self,
        identity: str,
        *,
        in_training: bool | None,
        families: Sequence[str] | None,
        held_out: Sequence[str] | None,
    ) -> None:
        """Records whether a program is remembered from the generator's training programs."""
        self._db.write(
            "UPDATE program SET in_training = ?, families = ?, held_out = ? WHERE identity = ?",
            (
                None if in_training is None else int(in_training),
                None if families is None else to_json(sorted(families)),
                None if held_out is None else to_json(sorted(held_out)),
                identity,
            ),
        )

    def programs(self) -> dict[str, Program]:
        """Identity -> program, in the order they came."""
        rows = self._db.read(
            "SELECT p.*, v.notes, v.cost FROM program p LEFT JOIN verdict v "
            "ON v.identity = p.identity AND v.source = p.source ORDER BY p.rowid"
        )
        return {
            row["identity"]: Program(
                identity=row["identity"],
                source=row["source"],
                fingerprint=row["fingerprint"],
                in_training=None if row["in_training"] is None else bool(row["in_training"]),
                families=None if row["families"] is None else tuple(json.loads(row["families"])),
                held_out=None if row["held_out"] is None else tuple(json.loads(row["held_out"])),
                notes=() if row["notes"] is None else tuple(json.loads(row["notes"])),
                cost=row["cost"],
            )
            for row in rows
        }


def _status(row: sqlite3.Row, seen: dict[str, str]) -> tuple[str, str, str | None]:
    """Status, rule and identity of a sample's row.

    `seen` maps what decides equality (identity, and fingerprint of outputs) to the first identity.
    """
    if row["source_hash"] is None:
        return "no program", "no program in the text", None
    if row["verdict"] is None:
        return "not judged", "", None
    if row["verdict"] not in ADMISSIBLE:
        return row["verdict"], row["rule"], None
    if row["applied"] not in (None, "admitted"):
        return row["applied"], row["applied_rule"], None
    identity = row["identity"]
    marks = [f"identity {identity}"]
    if row["fingerprint"] is not None:
        marks.append(f"outputs {row['fingerprint']}")
    original = next((seen[mark] for mark in marks if mark in seen), None)
    for mark in marks:
        seen.setdefault(mark, original or identity)
    return ("duplicate", "", original) if original else ("admitted", "", identity)


def _verdict(row: sqlite3.Row) -> StoredVerdict:
    fields = {name: row[name] for name in row.keys() if name != "source_hash"}  # noqa: SIM118
    for name in ("requests", "notes", "layers"):
        fields[name] = tuple(json.loads(fields[name]))
    fields["ir"] = fields.pop("wire")
    return StoredVerdict(**fields)


def _bounded(number: int | None) -> int | None:
    """SQLite's integers end at 2**63; a hostile program's cost need not."""
    return None if number is None else min(number, 2**63 - 1)
