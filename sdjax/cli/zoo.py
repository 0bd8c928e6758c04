"""`sdjax zoo list` and `train`."""

from __future__ import annotations

from pathlib import Path

import click

from sdjax.cli.group import FOLDER_PATH, examples


@click.group(name="zoo", epilog=examples("sdjax zoo list"))
def zoo_group() -> None:
    """The tiny trained models that ship with the package."""


@zoo_group.command(name="list", epilog=examples("sdjax zoo list"))
def zoo_list() -> None:
    """Name and folder of every model."""
    from sdjax.io.model_paths import zoo_models

    for name, folder in zoo_models().items():
        click.echo(f"zoo:{name}\t{folder}")


@zoo_group.command(name="train", epilog=examples("sdjax zoo train --out my-zoo"))
@click.option("--out", type=FOLDER_PATH, required=True, help="A new folder.")
def zoo_train(out: Path) -> None:
    """Rebuild the zoo from nothing: about half an hour on two cores."""
    from sdjax.core.progress import progress_bar
    from sdjax.zoo.train import train_zoo

    with progress_bar("zoo", 100) as advance:
        shown = 0.0

        def news(line: str, share: float) -> None:
            nonlocal shown
            advance(100 * share - shown, description=line)
            shown = 100 * share

        table = train_zoo(out, news)
    click.echo(f"{table}")
