"""`sdjax demo`, `run` and `report`: the loop, and what it found."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import click

from sdjax.cli.group import FOLDER_PATH, Interrupted, examples, exit_status, raise_interrupt
from sdjax.core.errors import UserError


@click.command(epilog=examples("sdjax demo"))
@click.option(
    "--out", type=FOLDER_PATH, help="Folder of the run; a new one below runs/ by default."
)
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Overrides the config."
)
def demo(out: Path | None, overrides: tuple[str, ...]) -> None:
    """Run the whole loop on the tiny models that ship with the package."""
    out = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    _run("configs/demo.yaml", out, overrides)


@click.command(epilog=examples("sdjax run configs/demo.yaml --out runs/first --set random=1"))
@click.argument("config", required=False)
@click.option("--out", type=FOLDER_PATH, help="Folder of a new run.")
@click.option("--resume", type=FOLDER_PATH, help="Goes on with the run in this folder.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Overrides the config."
)
def run(
    config: str | None, out: Path | None, resume: Path | None, overrides: tuple[str, ...]
) -> None:
    """Search for merge algorithms as CONFIG says."""
    if resume is not None:
        if config or out or overrides:
            raise UserError("--resume takes a folder and nothing else: its run has its own config")
        _resume(resume)
        return
    if config is None or out is None:
        raise UserError("run needs a config and --out DIR, or --resume DIR")
    _run(config, out, overrides)


def _run(config: str, out: Path, overrides: tuple[str, ...]) -> None:
    with _one_run(out):
        from sdjax.search.config_reader import read_config
        from sdjax.sharding.multihost import is_main_process

        settings = read_config(config, overrides)
        if is_main_process() and out.exists() and any(out.iterdir()):
            raise UserError(
                f"{out}: is not empty; choose another --out, "
                f"or go on with its run by --resume {out}"
            )
        _loop(settings, out)


def _resume(folder: Path) -> None:
    with _one_run(folder):
        from sdjax.search.multihost import stored_config

        _loop(stored_config(folder), folder)


@contextmanager
def _one_run(folder: Path) -> Iterator[None]:
    """Joins the processes of a run, where there are several, and lets them end together."""
    from sdjax.sharding.multihost import exit_together, start_distributed

    start_distributed()
    signal.signal(signal.SIGTERM, raise_interrupt)  # joining others, JAX takes it for itself
    with exit_together(exit_status):
        try:
            yield
        except KeyboardInterrupt:
            from sdjax.search import database

            begun = (folder / database.FILE).exists()
            hint = f"go on with: sdjax run --resume {folder}" if begun else "nothing was begun yet"
            raise Interrupted(hint) from None


def _loop(settings, folder: Path) -> None:
    from sdjax.search.loop import run as run_loop
    from sdjax.sharding.multihost import is_main_process

    def say(line: str) -> None:
        if is_main_process():
            click.echo(line)

    run_loop(settings, folder, say=say)
    if is_main_process():
        _report(folder)


@click.command(epilog=examples("sdjax report runs/first"))
@click.argument("folder", type=FOLDER_PATH)
def report(folder: Path) -> None:
    """Write the report of a run anew, finished or not, and print its tables."""
    _report(folder)


def _report(folder: Path) -> None:
    from rich.console import Console

    from sdjax.report import final_table, write_report
    from sdjax.search.store import Store

    with Store.open(folder) as store:
        for setting in store.settings():
            Console().print(final_table(store, setting.name))
        click.echo(f"report: {write_report(store, folder / 'report.html')}")
