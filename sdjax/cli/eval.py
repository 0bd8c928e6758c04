"""`sdjax eval`: evaluate a model on a task, or compare two evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from sdjax.cli.device_options import dtype_option, make_mesh, mesh_option
from sdjax.cli.group import ANY_PATH, FOLDER_PATH, echo, examples
from sdjax.cli.interrupts import resume_hint
from sdjax.cli.sandbox_options import allow_missing_option, trust_code_option
from sdjax.cli.task_options import accept_versions_option, task_options
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
@task_options(default="arithmetic")
@click.option(
    "--split",
    type=click.Choice(["development", "test", "all"]),
    help="Split of the problems, as in a run.  [default: all test problems]",
)
@click.option("--limit", type=click.IntRange(min=1), help="Evaluate at most this many problems.")
@click.option(
    "--out",
    type=FOLDER_PATH,
    help="Store results in this folder; an interrupted evaluation resumes there.",
)
@mesh_option
@dtype_option
@click.option("--batch", type=click.IntRange(min=1), help="Problems decoded at a time.")
@accept_versions_option
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

    hint = "run the same command to resume" if out else "use --out DIR to make it resumable"
    with resume_hint(hint):
        devices = make_mesh(mesh)
        evaluation = api.evaluate(model, task, out=out, mesh=devices, **options)
    echo(_report(evaluation, chat=options["chat"]))


def _report(evaluation: Evaluation, *, chat: bool) -> str:
    """Return a table of accuracies by kind of problem, and the failures."""
    from sdjax.evaluation.results import EQUAL_METRICS, METRICS
    from sdjax.evaluation.statistics import aligned_percents

    kinds = evaluation.by_kind()
    rows = (kinds if len(kinds) > 1 else {}) | {"all": evaluation}
    equal = all(problem.strict == problem.flexible for problem in evaluation.problems)
    columns = [[name.ljust(max(map(len, rows))) for name in rows]]
    for metric in METRICS[:1] if equal else METRICS:
        cells = aligned_percents([getattr(row, metric) for row in rows.values()])
        columns.append([cell if equal else f"{metric} {cell}" for cell in cells])
    table = ["   ".join(row) for row in zip(*columns, strict=True)]
    if equal:
        table.append(EQUAL_METRICS)
    failures = [
        f"{count} counted as wrong: {reason}" for reason, count in evaluation.failures.items()
    ]
    count = len(evaluation.problems)
    problems = f"{count} problem{'' if count == 1 else 's'}{', chat' if chat else ''}"
    title = f"{evaluation.model} on {evaluation.task} ({problems})"
    return "\n".join(
        [f"{title}, accuracy in %, 95% intervals", *evaluation.notes, *table, *failures]
    )
