"""`sdjax merge-lora`: add LoRA adapters of one model without the model."""

from __future__ import annotations

import math
from pathlib import Path

import click

from sdjax.cli.extract_lora import report
from sdjax.cli.group import FOLDER_PATH, examples
from sdjax.core.errors import UserError


@click.command(
    name="merge-lora",
    epilog=examples(
        "sdjax merge-lora both/ --adapter math-lora/=0.6 --adapter OWNER/CODE-LORA=0.4",
        "sdjax merge-lora small/ --adapter large-lora/=1 --rank 16",
    ),
)
@click.argument("out", type=FOLDER_PATH)
@click.option(
    "--adapter",
    "texts",
    multiple=True,
    metavar="ADAPTER=WEIGHT",
    help="A PEFT adapter, a folder or a name on Hugging Face, and its weight. Repeatable.",
)
@click.option(
    "--rank",
    type=click.IntRange(min=1),
    help="Compress the sum to this rank.  [default: exact, the sum of the ranks]",
)
def merge_lora(out: Path, texts: tuple[str, ...], rank: int | None) -> None:
    """Write the weighted sum of the changes of LoRA adapters as an adapter, in PEFT's format."""
    from sdjax.merging.adapters import merge_adapters

    report(merge_adapters(_parse_weights(texts), out, rank=rank))


def _parse_weights(texts: tuple[str, ...]) -> dict[str, float]:
    """Return adapter to weight of ADAPTER=WEIGHT texts.

    Raises:
        UserError: not of this form, or an adapter that occurs twice.
    """
    weights: dict[str, float] = {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            weight = float(number)
        except ValueError:
            weight = math.nan
        if not (name and equals and math.isfinite(weight)):
            raise UserError(f"--adapter {text}: write ADAPTER=WEIGHT, such as math-lora/=0.6")
        if name in weights:
            raise UserError(f"--adapter {text}: duplicate adapter; add its weights")
        weights[name] = weight
    return weights
