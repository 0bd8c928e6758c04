"""`sdjax run`: search for merge algorithms."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdjax.cli.group import FOLDER_PATH, examples, exit_status
from sdjax.cli.interrupts import handle_signals, resume_hint
from sdjax.cli.report import print_report
from sdjax.cli.sandbox_options import allow_missing_option, allow_missing_override
from sdjax.core.errors import UserError

if TYPE_CHECKING:
    from sdjax.search.config import RunConfig

overrides_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config."
)


@click.command(
    epilog=examples(
        "sdjax run configs/demo.yaml --out runs/first --set rng_seed=1",
        "sdjax run --resume runs/first",
    )
)
@click.argument("config", required=False)
@click.option("--out", type=FOLDER_PATH, help="Folder of the new run.")
@click.option("--resume", type=FOLDER_PATH, help="Resume the run in this folder.")
@overrides_option
@allow_missing_option
def run(
    config: str | None,
    out: Path | None,
    resume: Path | None,
    overrides: tuple[str, ...],
    allow_missing: tuple[str, ...],
) -> None:
    """Search for merge algorithms.

    CONFIG is a YAML file, or the name of a config that ships with the package.
    """
    overrides += allow_missing_override(allow_missing)
    if resume is not None:
        if config or out or overrides:
            raise UserError(
                "--resume takes only a folder; a resumed run keeps its config, so remove CONFIG, "
                "--out and --set"
            )
        resume_run(resume)
    elif config is None or out is None:
        raise UserError("run requires CONFIG and --out DIR, or --resume DIR")
    else:
        start_run(config, out, overrides)


def start_run(config: str, out: Path, overrides: tuple[str, ...]) -> None:
    """Start a run in a new folder."""
    with _joined_processes(out):
        from sdjax.search.config import read_config
        from sdjax.search.database import is_unused
        from sdjax.sharding.multihost import is_main_process

        run_config = read_config(config, overrides)
        if is_main_process() and out.exists() and not is_unused(out):
            raise UserError(
                f"{out}: not empty; choose another --out, or resume its run with --resume {out}"
            )
        _search(run_config, out)


def resume_run(folder: Path) -> None:
    """Resume the run in a folder."""
    with _joined_processes(folder):
        from sdjax.search.multihost import stored_config

        _search(stored_config(folder), folder)


@contextmanager
def _joined_processes(folder: Path) -> Iterator[None]:
    """Join the processes of a distributed run and make them exit together."""
    from sdjax.sharding.multihost import exit_together, start_distributed

    def hint() -> str:
        from sdjax.search.database import DATABASE_FILE

        started = (folder / DATABASE_FILE).exists()
        return f"resume with: sdjax run --resume {folder}" if started else "nothing was saved"

    if start_distributed():
        handle_signals()  # JAX has replaced a handler
    with exit_together(exit_status), resume_hint(hint):
        yield


def _search(config: RunConfig, folder: Path) -> None:
    from sdjax.search.loop import run_search
    from sdjax.sharding.multihost import is_main_process

    run_search(config, folder)
    if is_main_process():
        print_report(folder)
