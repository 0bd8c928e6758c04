"""`sdjax demo`: run the search on the tiny models that ship with the package."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import click

from sdjax.cli.group import FOLDER_PATH, examples
from sdjax.cli.run import overrides_option, start_run
from sdjax.cli.sandbox_options import allow_missing_option, allow_missing_override


@click.command(epilog=examples("sdjax demo"))
@click.option(
    "--out", type=FOLDER_PATH, help="Folder of the run.  [default: a new folder in runs/]"
)
@overrides_option
@allow_missing_option
def demo(out: Path | None, overrides: tuple[str, ...], allow_missing: tuple[str, ...]) -> None:
    """Run a complete search on the tiny models that ship with the package."""
    folder = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    start_run("demo", folder, overrides + allow_missing_override(allow_missing))
