"""Progress on stderr: a bar on a terminal, otherwise a line per tenth; by the main process.

Both appear only if INFO messages are logged, which the command line enables; the library alone
reports nothing.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from sdjax.core.logging import is_main_process

logger = logging.getLogger(__name__)

# Fast phases report only their end.
_SECONDS_BETWEEN_LINES = 1.0


class Advance(Protocol):
    """Function that reports finished steps."""

    def __call__(
        self, steps: float = 1, *, description: str | None = None, total: float | None = None
    ) -> None:
        """Report finished steps.

        Args:
            steps: number of steps that finished since the last call.
            description: new text in front of the bar.
            total: number of steps, if it was unknown before.
        """


@contextmanager
def progress_bar(
    description: str, total: float | None, *, completed: float = 0
) -> Iterator[Advance]:
    """Report the progress of a phase and yield a function that advances it.

    Without a terminal, the lines are log messages: one per finished tenth of the steps, but at most
    one per second, and one at the end. A phase without any steps logs nothing. The remaining time
    is estimated from the steps after the first call, which often includes compilation.

    Args:
        description: text in front of the bar.
        total: number of steps, or None if it is unknown.
        completed: number of steps that were finished earlier, which the estimate of the remaining
            time ignores.
    """
    console = Console(stderr=True)
    if not (logger.isEnabledFor(logging.INFO) and is_main_process()):
        yield _ignore
    elif console.is_terminal:
        with _bar(console) as progress:
            task = progress.add_task(description, total=total, completed=int(completed))

            def advance(
                steps: float = 1, *, description: str | None = None, total: float | None = None
            ) -> None:
                progress.update(task, advance=steps, description=description, total=total)

            yield advance
    else:
        lines = _ProgressLines(description, total, completed)
        yield lines.advance
        lines.finish()


def format_duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as "45 s", "2 min 40 s" or "3 h 20 min"."""
    seconds = max(0, round(seconds))
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        large, small = divmod(seconds, 60)
        return f"{large} min {small} s" if small else f"{large} min"
    if seconds < 86_400:
        large, small = divmod(round(seconds / 60), 60)
        return f"{large} h {small} min" if small else f"{large} h"
    large, small = divmod(round(seconds / 3600), 24)
    days = f"{large} day{'s' if large > 1 else ''}"
    return f"{days} {small} h" if small else days


def _bar(console: Console) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )


def _ignore(
    steps: float = 1, *, description: str | None = None, total: float | None = None
) -> None:
    pass


class _ProgressLines:
    """The lines of one phase."""

    def __init__(self, description: str, total: float | None, completed: float) -> None:
        self._description = self._phase = description
        self._total = total
        self._completed = self._first = completed
        self._start = self._last_line = time.monotonic()
        # Time and steps at the first call, from which rates are measured.
        self._measured_from: tuple[float, float] | None = None

    def advance(
        self, steps: float = 1, *, description: str | None = None, total: float | None = None
    ) -> None:
        """Log a line if these steps finish a tenth of the total; see `Advance`."""
        before, now = self._completed, time.monotonic()
        self._completed += steps
        self._description = description or self._description
        self._total = self._total if total is None else total
        if self._measured_from is None:
            self._measured_from = now, self._completed
        if not self._total or self._completed >= self._total:
            return
        tenth = int(10 * self._completed / self._total)
        if tenth == int(10 * before / self._total):
            return
        if now - self._last_line < _SECONDS_BETWEEN_LINES:
            return
        self._last_line = now
        percent = int(100 * self._completed / self._total)
        start, first = self._measured_from
        left = ""
        if self._completed > first:
            seconds = (now - start) / (self._completed - first) * (self._total - self._completed)
            left = f", {format_duration(seconds)} left"
        logger.info("%s: %d %%, %s%s", self._description, percent, self._count, left)

    def finish(self) -> None:
        """Log the last line of a phase that had any steps, and how many this process did."""
        if self._completed > self._first:
            duration = format_duration(time.monotonic() - self._start)
            own = f" ({self._completed - self._first:,.0f} in this process)" if self._first else ""
            logger.info("%s: %s%s in %s", self._phase, self._count, own, duration)

    @property
    def _count(self) -> str:
        done = f"{self._completed:,.0f}"
        return done if self._total is None else f"{done} of {self._total:,.0f}"
