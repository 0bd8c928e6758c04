"""`sdjax demo`: run the search on the tiny models that ship with the package."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from sdjax.cli.group import FOLDER_PATH, examples
from sdjax.cli.run import overrides_option, start_run


@click.command(epilog=examples("sdjax demo"))
@click.option(
    "--out", type=FOLDER_PATH, help="Folder of the run.  [default: a new folder in runs/]"
)
@overrides_option
def demo(out: Path | None, overrides: tuple[str, ...]) -> None:
    """Run a complete search on the tiny models that ship with the package."""
    start_run("demo", out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}", overrides)
