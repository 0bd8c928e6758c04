"""`sdjax zoo list` and `sdjax zoo train`: list or retrain the models that ship with the package."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

from sdjax.cli.group import FOLDER_PATH, echo, examples
from sdjax.cli.interrupts import resume_hint


@click.group(name="zoo", epilog=examples("sdjax zoo list"))
def zoo_group() -> None:
    """List or retrain the tiny models that ship with the package."""


@zoo_group.command(name="list", epilog=examples("sdjax zoo list"))
def zoo_list() -> None:
    """Print the name and folder of every model."""
    from sdjax.io.model_paths import zoo_models

    for name, folder in zoo_models().items():
        echo(f"zoo:{name}\t{folder}")


@zoo_group.command(name="train", epilog=examples("sdjax zoo train --out my-zoo"))
@click.option(
    "--out",
    type=FOLDER_PATH,
    required=True,
    help="Folder to write; resumes with the first model that the folder lacks.",
)
def zoo_train(out: Path) -> None:
    """Train the zoo from scratch, which takes about half an hour on two cores.

    Complete models in the folder are kept, whichever versions of the packages trained them.
    """
    from sdjax.zoo.train import train_zoo

    with resume_hint(f"resume with: sdjax zoo train --out {shlex.quote(str(out))}"):
        echo(str(train_zoo(out)))
