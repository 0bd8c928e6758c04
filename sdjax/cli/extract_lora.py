"""`sdjax extract-lora`: write the difference of two models as a LoRA adapter."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdjax.cli.device_options import make_mesh, mesh_option
from sdjax.cli.group import FOLDER_PATH, echo, examples

if TYPE_CHECKING:
    from sdjax.merging.adapters import AdapterResult


@click.command(
    name="extract-lora",
    epilog=examples(
        "sdjax extract-lora BASE MODEL adapter/ --rank 32",
        "sdjax extract-lora zoo:seed zoo:reader reader-lora/ --rank 8",
    ),
)
@click.argument("base")
@click.argument("model")
@click.argument("out", type=FOLDER_PATH)
@click.option("--rank", type=click.IntRange(min=1), required=True, help="Maximum rank.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@mesh_option
def extract_lora(base: str, model: str, out: Path, rank: int, seed: int, mesh: str | None) -> None:
    """Write the difference between BASE and MODEL as a LoRA adapter of BASE, in PEFT's format.

    The projections of attention and MLP are approximated by a randomized singular value
    decomposition. The relative error of each is printed.
    """
    from sdjax.merging import adapters

    result = adapters.extract_lora(base, model, out, rank=rank, seed=seed, mesh=make_mesh(mesh))
    report(result)


def report(result: AdapterResult) -> None:
    """Print the rank and the error of each tensor, and notes to standard error."""
    for note in result.notes:
        echo(f"sdjax: {note}", err=True)
    width = max(len(tensor.name) for tensor in result.tensors)
    for tensor in result.tensors:
        echo(f"{tensor.name:<{width}}  rank {tensor.rank}  error {100 * tensor.error:.3g} %")
    worst = max(result.tensors, key=lambda tensor: tensor.error)
    largest = f"largest error {100 * worst.error:.3g} % ({worst.name})" if worst.error else "exact"
    echo(f"{result.folder}: {len(result.tensors)} tensors; {largest}")
