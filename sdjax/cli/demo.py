"""`sdjax demo`: run the search on the tiny models that ship with the package."""

from __future__ import annotations

from pathlib import Path

import click

from sdjax.cli.group import FOLDER_PATH, examples
from sdjax.cli.run import (
    dry_run_option,
    limit_options,
    limit_overrides,
    overrides_option,
    start_run,
)
from sdjax.cli.sandbox_options import allow_missing_option, allow_missing_override
from sdjax.cli.watchdog import new_demo_folder


@click.command(epilog=examples("sdjax demo"))
@click.option(
    "--out", type=FOLDER_PATH, help="Folder of the run.  [default: a new folder in runs/]"
)
@overrides_option
@limit_options
@dry_run_option
@allow_missing_option
def demo(
    out: Path | None,
    overrides: tuple[str, ...],
    max_hours: float | None,
    max_programs: int | None,
    dry_run: bool,
    allow_missing: tuple[str, ...],
) -> None:
    """Run a complete search on the tiny models that ship with the package.

    This is `sdjax run demo`, in a new folder.
    """
    folder = out or new_demo_folder()
    overrides += limit_overrides(max_hours, max_programs)
    start_run("demo", folder, overrides + allow_missing_override(allow_missing), dry_run=dry_run)
