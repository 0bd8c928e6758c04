"""Progress on the terminal; nothing where standard error is not one, or on a further process."""

from __future__ import annotations

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

from sdjax.sharding.multihost import is_main_process

Advance = Callable[..., None]


@contextmanager
def progress_bar(description: str, total: float | None) -> Iterator[Advance]:
    """Shows a bar; yields `advance(steps=1, description=None)`."""
    console = Console(stderr=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    shown = console.is_terminal and is_main_process()
    with Progress(*columns, console=console, disable=not shown) as progress:
        task = progress.add_task(description, total=total)

        def advance(steps: float = 1, description: str | None = None) -> None:
            progress.update(task, advance=steps, description=description)

        yield advance
