"""`sdjax tune`: tune the numbers of a merge on a task."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import click

from sdjax.cli.device_options import dtype_option, make_mesh, mesh_option
from sdjax.cli.group import FOLDER_PATH, echo, examples
from sdjax.cli.interrupts import resume_hint
from sdjax.cli.named_values import parse_experts
from sdjax.cli.sandbox_options import SCOPE_HELP, allow_missing_option, trust_code_option
from sdjax.cli.search_options import search_options
from sdjax.cli.task_options import accept_versions_option, task_options
from sdjax.core.errors import UserError


@click.command(
    epilog=examples(
        "sdjax tune weights --base zoo:seed --expert a=zoo:reader --expert b=zoo:judge --budget 10",
        "sdjax tune mine.py --base BASE --expert expert_1=MODEL --task gsm8k --budget 50 --out DIR",
        "sdjax tune recipe.yaml --task svamp --budget 200 --optimizer cmaes --merged merged/",
    ),
)
@click.argument("what", metavar="PROGRAM|RECIPE|FAMILY")
@click.option("--base", metavar="MODEL", help="The base model; a RECIPE names its own.")
@click.option(
    "--expert", "experts", multiple=True, metavar="NAME=MODEL", help="An expert. Repeatable."
)
@click.option("--scope", metavar="SCOPE", help=SCOPE_HELP.replace("tensors", "Tensors", 1))
@task_options(default=None)
@click.option(
    "--limit",
    type=click.IntRange(min=1),
    help="Use at most this many development problems per evaluation.",
)
@click.option(
    "--metric",
    type=click.Choice(["strict", "flexible"]),
    default="strict",
    show_default=True,
    help="Accuracy that is the score.",
)
@search_options(budget="Number of evaluations of the development problems.")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=8,
    show_default=True,
    help="Rows of packed training problems per gradient step.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Seed of the search and of random merge methods.",
)
@click.option(
    "--set",
    "overrides",
    multiple=True,
    metavar="NAME=START[,LOW,HIGH]",
    help="Initial value and bounds of a number that is tuned. Repeatable.",
)
@click.option(
    "--out",
    type=FOLDER_PATH,
    help="Store the trace, the tuned program or recipe and a plot in this folder; an interrupted "
    "search resumes there.",
)
@click.option("--merged", type=FOLDER_PATH, help="Write the merged model to this folder.")
@mesh_option
@dtype_option
@accept_versions_option
@trust_code_option
@allow_missing_option
def tune(
    what: str,
    experts: tuple[str, ...],
    overrides: tuple[str, ...],
    out: Path | None,
    merged: Path | None,
    mesh: str | None,
    **options: Any,
) -> None:
    """Tune the numbers of a merge on a task.

    PROGRAM is a Python file in the algorithm API, whose constants are tuned. RECIPE is a YAML file
    of mergekit or mergekit-evolve. FAMILY is weights, slope, layers or kinds, a shipped method, or
    METHOD:FAMILY.

    Half of the development problems choose between candidates; the other half measures what was
    gained.
    """
    from sdjax.tuning.api import tune as tune_merge
    from sdjax.tuning.results import RESULT

    hint = "run the same command to resume" if out else "use --out DIR to make it resumable"
    with resume_hint(hint):
        result = tune_merge(
            what,
            experts=parse_experts(experts),
            overrides=parse_overrides(overrides),
            out=out,
            merged=merged,
            mesh=make_mesh(mesh),
            **options,
        )
    echo(result.summary())
    if out is None:
        echo(result.text.rstrip())
    else:
        echo(f"{out}: {', '.join(result.files)}, {RESULT}")
    if merged is not None:
        echo(f"{merged}: the merged model")


def parse_overrides(texts: Iterable[str]) -> dict[str, tuple[float, ...]]:
    """Return name to (start,) or (start, low, high) of NAME=START[,LOW,HIGH] texts.

    Raises:
        UserError: not of this form, or a name that occurs twice.
    """
    overrides: dict[str, tuple[float, ...]] = {}
    for text in texts:
        name, _, numbers = text.rpartition("=")
        try:
            values = tuple(map(float, numbers.split(",")))
        except ValueError:
            values = ()
        if not name or len(values) not in (1, 3):
            raise UserError(
                f"--set {text}: write NAME=START or NAME=START,LOW,HIGH, such as scale=0.5,0,2"
            )
        if name in overrides:
            raise UserError(f"--set {text}: {name} is already set; name it once")
        overrides[name] = values
    return overrides
