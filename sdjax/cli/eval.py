"""`sdjax eval`."""

from __future__ import annotations

from pathlib import Path

import click
from click.core import ParameterSource

from sdjax.cli.group import ANY_PATH, FOLDER_PATH, Interrupted, examples
from sdjax.core.errors import UserError


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
    help="arithmetic, gsm8k, math, svamp, a JSONL file, or module:Class.",
)
@click.option("--data", type=ANY_PATH, help="The problems; the Hugging Face hub's otherwise.")
@click.option("--shots", type=click.IntRange(min=0), help="Worked examples before each problem.")
@click.option(
    "--split",
    type=click.Choice(["development", "test", "all"]),
    help="As a run divides the problems; by default all test problems.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Scores the first so many problems.")
@click.option("--chat", is_flag=True, help="Puts problems by the tokenizer's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="The longest answer.")
@click.option(
    "--out", type=FOLDER_PATH, help="Keeps results here; goes on where it was interrupted."
)
@click.option(
    "--compare",
    nargs=2,
    type=ANY_PATH,
    metavar="A B",
    help="Compares two --out folders (or their results.jsonl) problem by problem.",
)
@click.option(
    "--allow-missing",
    multiple=True,
    metavar="LAYER",
    help="Goes on where this machine lacks that layer of a grader's confinement.",
)
@click.pass_context
def evaluate(
    context: click.Context,
    model: str | None,
    task: str,
    out: Path | None,
    compare: tuple[Path, Path] | None,
    **options,
) -> None:
    """Score MODEL (a folder, a name on Hugging Face, or zoo:NAME) on a task."""
    if compare is not None:
        for parameter in context.command.params:
            source = context.get_parameter_source(parameter.name or "")
            if source is ParameterSource.COMMANDLINE and parameter.name != "compare":
                raise UserError(f"--compare takes two results and no {parameter.opts[0]}")
        from sdjax.evaluation.comparison import compare as compare_results

        click.echo(compare_results(*compare))
        return
    if model is None:
        raise UserError("eval needs a MODEL, or --compare A B")
    from sdjax.evaluation.job import evaluate_model

    try:
        click.echo(evaluate_model(model, task, out=out, **options))
    except KeyboardInterrupt:
        hint = "go on by the same command" if out else "with --out DIR it could go on"
        raise Interrupted(hint) from None
