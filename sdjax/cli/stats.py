"""`sdjax stats`: compute the statistics of a model that fisher and regmean need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from sdjax.cli.device_options import dtype_option, make_mesh, mesh_option
from sdjax.cli.group import FOLDER_PATH, echo, examples
from sdjax.cli.interrupts import resume_hint
from sdjax.cli.sandbox_options import allow_missing_option, trust_code_option


@click.command(
    epilog=examples(
        "sdjax stats MODEL --data texts.jsonl",
        "sdjax stats MODEL --task gsm8k --kinds fisher --limit 500",
        "sdjax stats zoo:reader --task arithmetic --limit 100 --out reader.stats",
    )
)
@click.argument("model")
@click.option(
    "--data",
    metavar="FILE",
    help="JSONL file whose rows have text, or prompt and completion, or messages; with --task, "
    "the file or folder with the problems.",
)
@click.option(
    "--task",
    help="Use the training problems of a task: arithmetic, gsm8k, math, svamp, a JSONL file, or "
    "module:Class with --trust-code.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Use at most this many examples.")
@click.option("--chat", is_flag=True, help="Format problems with the tokenizer's chat template.")
@click.option(
    "--kinds",
    default="fisher,gram,input_norm",
    show_default=True,
    metavar="KIND,…",
    help="Which statistics: fisher has the size of the model in float32, gram about twice that.",
)
@click.option(
    "--labels",
    type=click.Choice(["model", "data"]),
    default="model",
    show_default=True,
    help="Tokens whose likelihood the Fisher information is of: drawn from the model, or those of "
    "the data (empirical).",
)
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True)
@click.option(
    "--max-length",
    type=click.IntRange(min=2),
    default=2048,
    show_default=True,
    help="Maximum tokens of an example.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@click.option(
    "--checkpoint-every",
    type=click.IntRange(min=1),
    default=512,
    show_default=True,
    metavar="N",
    help="Store the sums after every N examples; an interrupted computation resumes there.",
)
@click.option("--out", type=FOLDER_PATH, help="Folder of the statistics.  [default: MODEL.stats]")
@mesh_option
@dtype_option
@trust_code_option
@allow_missing_option
def stats(
    model: str,
    out: Path | None,
    kinds: str,
    labels: Any,
    batch: int,
    max_length: int,
    seed: int,
    checkpoint_every: int,
    mesh: str | None,
    **options: Any,
) -> None:
    """Compute the statistics of MODEL on data, which the methods fisher and regmean need.

    MODEL is a folder, a name on Hugging Face, or zoo:NAME, with +ADAPTER for a PEFT adapter. A
    recipe finds the statistics of a local model next to it; others are named by `stats:`.
    """
    from sdjax.statistics.api import compute_stats
    from sdjax.statistics.config import StatisticsConfig

    settings = StatisticsConfig(
        kinds=tuple(kind.strip() for kind in kinds.split(",")),
        labels=labels,
        batch=batch,
        max_length=max_length,
        seed=seed,
        checkpoint_every=checkpoint_every,
    )
    with resume_hint("run the same command to resume"):
        result = compute_stats(model, out, settings=settings, mesh=make_mesh(mesh), **options)
    echo(
        f"{result.folder}: {result.count} arrays from {result.examples:,} examples "
        f"({result.tokens:,} tokens); {result.bytes / 1e6:,.1f} MB"
    )
