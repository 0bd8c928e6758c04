"""`sdjax report`: write the report of a run."""

from __future__ import annotations

from pathlib import Path

import click

from sdjax.cli.group import FOLDER_PATH, echo, examples


@click.command(epilog=examples("sdjax report runs/first"))
@click.argument("folder", type=FOLDER_PATH)
def report(folder: Path) -> None:
    """Write the report of a finished or unfinished run, and print its tables."""
    print_report(folder)


def print_report(folder: Path) -> None:
    """Write the report of a run and print its final tables and the report's path."""
    from rich.console import Console

    from sdjax.report import TABLE_WIDTH, final_table, write_report
    from sdjax.search.store import Store
    from sdjax.search.types import Setting

    console = Console()
    if not console.is_terminal:
        console = Console(width=TABLE_WIDTH)
    with Store.open(folder) as store:
        for setting in store.select(Setting):
            console.print(final_table(store, setting.name, width=console.width), end="\n\n")
        echo(f"report: {write_report(store, folder / 'report.html')}")
