"""Trace of a search: every step and every evaluation, in the order in which they were computed.

A search is a deterministic function of what it has computed. If it was killed, it runs again from
the beginning, and whatever the trace contains is returned instead of being computed; its result is
therefore that of an uninterrupted search.

trace.jsonl     one event per line, see `Trace.record`
settings.json   settings and versions; see `sdjax.io.resumable_log`
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

from sdjax.core.errors import UserError
from sdjax.core.json import parse_json
from sdjax.core.logging import is_main_process
from sdjax.io.resumable_log import ResumableLog
from sdjax.sharding.multihost import broadcast_from_main

TRACE, LOCK = "trace.jsonl", "tune.lock"


class Trace:
    """Events of a search, kept in memory and, if there is a folder, on disk.

    Attributes:
        events: all events so far, in order.
    """

    def __init__(
        self,
        folder: Path | None = None,
        settings: Mapping[str, Any] | None = None,
        *,
        versions: Mapping[str, str] | None = None,
        accept_versions: bool = False,
    ) -> None:
        """Open or create the trace; with several processes, the main one writes it.

        Args:
            folder: folder of the trace, or None to keep it in memory only.
            settings: everything that the events depend on, JSON-compatible.
            versions: versions of packages, which are compared with those of the folder as soon as
                an interrupted search computes something new.
            accept_versions: continue although versions differ, and record the difference.

        Raises:
            UserError: the folder contains something else or a search with different settings, or
                another process is writing to it.
        """
        self.events: list[dict[str, Any]] = []
        self._stored: list[dict[str, Any]] = []
        self._log: ResumableLog | None = None
        if folder is None:
            return
        if is_main_process():
            self._log = ResumableLog(
                folder,
                settings or {},
                file=TRACE,
                lock=LOCK,
                content="search of sdjax tune",
                versions=versions,
                accept_versions=accept_versions,
            )
        try:
            lines = json.loads(broadcast_from_main(lambda: json.dumps(self._lines()).encode()))
            self._stored = [self._parse(number, line) for number, line in enumerate(lines, 1)]
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file and release the lock."""
        if self._log is not None:
            self._log.close()

    @property
    def is_replayed(self) -> bool:
        """Whether the last event was read from the folder."""
        return len(self.events) <= len(self._stored)

    def count_stored(self, kind: str) -> int:
        """Return the number of events of one kind that an interrupted search has left."""
        return sum(event.get("event") == kind for event in self._stored)

    @property
    def seconds(self) -> float:
        """Total time of all computations, in whichever process they took place."""
        return sum(event["seconds"] for event in self.events)

    def record(
        self, request: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
    ) -> dict[str, Any]:
        """Return the event of a computation: its request and its result.

        Args:
            request: what is computed, JSON-compatible: "event" names the kind, "values" the numbers
                that are tuned.
            compute: computes the result, JSON-compatible; not called if the trace has it.

        Raises:
            UserError: the trace has another event at this place.
        """
        request, place = dict(request), len(self.events)
        if place < len(self._stored):
            event = self._stored[place]
            if {key: event.get(key) for key in request} != request:
                raise UserError(
                    f"{self._where(place + 1)}: not the event that this search computes here "
                    f"({request['event']}); the file was changed, or another version of sdjax "
                    "wrote it: choose another --out"
                )
        else:
            if place == len(self._stored) > 0 and self._log is not None:
                self._log.check_versions()
            start = time.perf_counter()
            result = dict(compute())
            event = request | result | {"seconds": round(time.perf_counter() - start, 4)}
            if self._log is not None:
                self._log.append(json.dumps(event, allow_nan=False))
        self.events.append(event)
        return event

    def _lines(self) -> list[str]:
        return [] if self._log is None else self._log.lines

    def _parse(self, number: int, line: str) -> dict[str, Any]:
        try:
            event = parse_json(line, non_finite=True)
        except ValueError:
            event = None
        if not isinstance(event, dict) or not isinstance(event.get("seconds"), int | float):
            raise UserError(
                f"{self._where(number)}: not an event of a search; restore the file, or choose "
                "another --out"
            )
        return event

    def _where(self, number: int) -> str:
        return f"{TRACE if self._log is None else self._log.path}, line {number}"
