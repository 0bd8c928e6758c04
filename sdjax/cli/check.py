"""`sdjax check`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from sdjax.cli.group import FILE_PATH, examples


@click.command(epilog=examples("sdjax check program.py --json"))
@click.argument("files", type=FILE_PATH, nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Prints one JSON object a file.")
@click.option("--show", is_flag=True, help="Prints each verified array program as well.")
@click.option(
    "--model",
    default="zoo:seed",
    show_default=True,
    metavar="CONFIG",
    help="Whose tensors are merged: a model folder, its config.json, or zoo:NAME.",
)
@click.option(
    "--experts",
    type=click.IntRange(1, 64),
    default=3,
    show_default=True,
    help="How many experts there are.",
)
@click.option(
    "--allow-missing",
    multiple=True,
    metavar="LAYER",
    help="Goes on where this machine lacks that layer of confinement.",
)
def check(
    files: tuple[Path, ...],
    as_json: bool,
    show: bool,
    model: str,
    experts: int,
    allow_missing: tuple[str, ...],
) -> None:
    """Judge program FILES in the sandbox; exit status 1 where one is not admitted."""
    from sdjax.io.hf_checkpoint import read_config
    from sdjax.io.model_paths import model_folder
    from sdjax.merging.engine import default_slots
    from sdjax.models.params import kind_of, param_specs
    from sdjax.sandbox.check import check_files
    from sdjax.sandbox.signature import MergeSignature

    described = Path(model)
    folder = described.parent if described.name == "config.json" else model_folder(model)
    specs = param_specs(read_config(folder))
    tensors = {path: (kind_of(path), spec.shape) for path, spec in specs.items()}
    signature = MergeSignature.of(default_slots(experts), tensors)
    text, status = check_files(
        files, signature, as_json=as_json, show=show, allow_missing=allow_missing
    )
    click.echo(text)
    sys.exit(status)
