"""`sdjax eval`: evaluate a model on a task, or compare two evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sdjax.cli.device_options import dtype_option, mesh_option, parse_mesh
from sdjax.cli.group import ANY_PATH, FOLDER_PATH, echo, examples
from sdjax.cli.interrupts import resume_hint
from sdjax.cli.sandbox_options import allow_missing_option, trust_code_option
from sdjax.core.errors import UserError

if TYPE_CHECKING:
    from sdjax.evaluation.api import Evaluation


@click.command(
    name="eval",
    epilog=examples(
        "sdjax eval MODEL --task gsm8k --data gsm8k_test.jsonl --out scores/model",
        "sdjax eval zoo:seed --task arithmetic --limit 200",
        "sdjax eval --compare scores/model scores/merged",
    ),
)
@click.argument("model", required=False)
@click.option(
    "--task",
    default="arithmetic",
    show_default=True,
    help="arithmetic, gsm8k, math, svamp, a JSONL file, or module:Class with --trust-code.",
)
@click.option(
    "--data",
    type=ANY_PATH,
    help="File or folder with the problems.  [default of gsm8k, math, svamp: Hugging Face Hub]",
)
@click.option("--shots", type=click.IntRange(min=0), help="Number of worked examples.")
@click.option(
    "--split",
    type=click.Choice(["development", "test", "all"]),
    help="Split of the problems, as in a run.  [default: all test problems]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate at most this many problems.")
@click.option("--chat", is_flag=True, help="Format prompts with the tokenizer's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="Maximum tokens per answer.")
@click.option(
    "--out",
    type=FOLDER_PATH,
    help="Store results in this folder; an interrupted evaluation resumes there.",
)
@mesh_option
@dtype_option
@click.option("--batch", type=click.IntRange(min=1), help="Problems decoded at a time.")
@click.option(
    "--accept-versions",
    is_flag=True,
    help="Resume although versions of packages differ; --out records it.",
)
@click.option(
    "--compare",
    nargs=2,
    type=ANY_PATH,
    metavar="A B",
    help="Compare two --out folders (or their results.jsonl) problem by problem.",
)
@trust_code_option
@allow_missing_option
@click.pass_context
def evaluate(
    context: click.Context,
    model: str | None,
    task: str,
    out: Path | None,
    compare: tuple[Path, Path] | None,
    mesh: str | None,
    **options: Any,
) -> None:
    """Evaluate MODEL on a task.

    MODEL is a folder, a name on Hugging Face, or zoo:NAME, with +ADAPTER for a PEFT adapter.
    """
    if compare is not None:
        for parameter in context.command.params:
            source = context.get_parameter_source(parameter.name or "")
            if source is ParameterSource.COMMANDLINE and parameter.name != "compare":
                raise UserError(f"--compare cannot be combined with {parameter.opts[0]}; remove it")
        from sdjax.evaluation.comparison import compare as compare_results

        echo(compare_results(*compare))
        return
    if model is None:
        raise UserError("eval requires MODEL, or --compare A B")
    from sdjax.evaluation import api
    from sdjax.sharding.config import MeshConfig

    hint = "run the same command to resume" if out else "use --out DIR to make it resumable"
    with resume_hint(hint):
        devices = (parse_mesh(mesh) or MeshConfig()).make(default_axis="tensor")
        evaluation = api.evaluate(model, task, out=out, mesh=devices, **options)
    echo(_report(evaluation, chat=options["chat"]))


def _report(evaluation: Evaluation, *, chat: bool) -> str:
    """Return a table of accuracies by kind of problem, and the failures."""
    from sdjax.evaluation.results import METRICS

    kinds = evaluation.by_kind()
    rows = (kinds if len(kinds) > 1 else {}) | {"all": evaluation}
    width = max(map(len, rows))
    table = []
    for name, row in rows.items():
        cells = []
        for metric in METRICS:
            interval = getattr(row, metric)
            cells.append(f"{metric} {interval.in_percent()}")
        table.append(f"{name:{width}s}  {'   '.join(cells)}")
    failures = [
        f"{count} counted as wrong: {reason}" for reason, count in evaluation.failures.items()
    ]
    count = len(evaluation.problems)
    problems = f"{count} problem{'' if count == 1 else 's'}{', chat' if chat else ''}"
    title = f"{evaluation.model} on {evaluation.task} ({problems})"
    return "\n".join(
        [f"{title}, accuracy in %, 95% intervals", *evaluation.notes, *table, *failures]
    )
