"""Progress bars on stderr: on a terminal, by the main process, if INFO messages are logged.

The command line enables INFO messages; the library alone draws nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

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

Advance = Callable[..., None]


@contextmanager
def progress_bar(description: str, total: float | None) -> Iterator[Advance]:
    """Show a progress bar and yield `advance(steps=1, description=None)`.

    Args:
        description: text in front of the bar.
        total: number of steps, or None if it is unknown.
    """
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    enabled = logging.getLogger("sdjax").isEnabledFor(logging.INFO)
    disabled = not (enabled and console.is_terminal and is_main_process())
    with Progress(*columns, console=console, disable=disabled) as progress:
        task = progress.add_task(description, total=total)

        def advance(steps: float = 1, description: str | None = None) -> None:
            progress.update(task, advance=steps, description=description)

        yield advance
