"""`sdjax merge` and `methods`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import click

from sdjax.cli.group import ANY_PATH, FILE_PATH, FOLDER_PATH, examples
from sdjax.core.errors import UserError


@click.command(
    epilog=examples(
        "sdjax merge recipe.yaml merged/",
        "sdjax merge --algorithm mine.py --base zoo:seed --expert expert_1=zoo:reader merged/",
        "sdjax merge --run runs/first --rank 1 merged/",
    ),
)
@click.argument("paths", nargs=-1, required=True, metavar="[RECIPE] OUT", type=ANY_PATH)
@click.option("--seed", type=int, help="Of random methods; a run has its own. [default: 0]")
@click.option("--algorithm", type=FILE_PATH, help="A program of the algorithm API, admitted first.")
@click.option("--base", metavar="MODEL", help="With --algorithm: what task vectors start from.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=MODEL", help="With --algorithm.")
@click.option("--scope", help="With --algorithm: which tensors. [default: mlp]")
@click.option("--run", type=FOLDER_PATH, help="Applies a program that this run has discovered.")
@click.option("--rank", type=click.IntRange(min=1), help="With --run: its place. [default: 1]")
def merge(
    paths: tuple[Path, ...],
    seed: int | None,
    algorithm: Path | None,
    base: str | None,
    experts: tuple[str, ...],
    scope: str | None,
    run: Path | None,
    rank: int | None,
) -> None:
    """Merge checkpoints into the model folder OUT, which appears when it is complete.

    RECIPE is mergekit's YAML. A merge that was interrupted goes on when it is called again.
    """
    if len(paths) != (2 if algorithm is None and run is None else 1):
        raise UserError("merge takes RECIPE OUT, or --algorithm FILE or --run DIR with OUT alone")
    if algorithm is not None and run is not None:
        raise UserError("merge takes --algorithm or --run, not both")
    if algorithm is None and (base or experts or scope is not None):
        raise UserError("--base, --expert and --scope belong to --algorithm FILE")
    if rank is not None and run is None:
        raise UserError("--rank belongs to --run DIR")
    if seed is not None and run is not None:
        raise UserError("--seed does not go with --run DIR, which merges as the run has scored it")
    from sdjax.core.progress import progress_bar

    with progress_bar("merge", None) as advance:
        shown = 0

        def on_tensor(done: int, total: int, name: str) -> None:
            nonlocal shown
            advance(done - shown, description=f"merge {done} of {total} tensors")
            shown = done

        out = paths[-1]
        if algorithm is not None:
            from sdjax.programs.merge_from_source import merge_program

            if base is None:
                raise UserError("--algorithm needs --base MODEL")
            named = _named_experts(experts)
            written = merge_program(
                algorithm,
                base,
                named,
                out,
                scope=scope or "mlp",
                seed=seed or 0,
                on_tensor=on_tensor,
            )
        elif run is not None:
            from sdjax.search.merge_from_run import merge_discovered

            written = merge_discovered(run, rank or 1, out, on_tensor=on_tensor)
        else:
            from sdjax.merging.methods.registry import methods as all_methods
            from sdjax.merging.recipe.pipeline import merge_recipe

            written = merge_recipe(
                paths[0], out, all_methods(), seed=seed or 0, on_tensor=on_tensor
            )
    _tell_merged(written)


def _named_experts(texts: Iterable[str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for text in texts:
        name, equals, model = text.partition("=")
        if not (name and equals and model):
            raise UserError(f"--expert {text}: write NAME=MODEL, such as expert_1=zoo:reader")
        if name in named:
            raise UserError(f"--expert {text}: {name} is {named[name]} already; name each once")
        named[name] = model
    return named


def _tell_merged(written) -> None:
    for note in written.notes:
        click.echo(f"sdjax: {note}", err=True)
    went_on = f", {written.resumed} of them from before" if written.resumed else ""
    click.echo(
        f"{written.folder}: {written.tensors} tensors{went_on}, {written.bytes / 1e6:,.1f} MB"
    )


@click.command(epilog=examples("sdjax methods"))
def methods() -> None:
    """List the human-designed merge methods with parameters, defaults and mathematics."""
    from rich.console import Console
    from rich.table import Table

    from sdjax.merging.methods.registry import methods as all_methods

    table = Table("method", "parameters", "in a recipe", "mathematics", show_lines=True)
    for method in all_methods().values():
        schema, own, other = method.schema, [], []
        for one in method.hyperparameters:
            own.append(f"{one.name}{'*' if one.type == 'per_expert' else ''}={one.default}")
            key = schema.recipe_key(one.name)
            if one.name in schema.required:
                other.append(f"{key} (needed)")
            elif key != one.name or one.name in schema.defaults:
                other.append(f"{key}={schema.defaults.get(one.name, one.default)}")
        table.add_row(method.name, ", ".join(own), ", ".join(other), method.formula)
    console = Console()
    # A file or a pipe has no edge to fold a line at.
    (console if console.is_terminal else Console(width=300)).print(table)
    click.echo(
        "* one number, or one for each expert. These are the names and defaults in Python and in a "
        "search, which follow the papers; a recipe's follow mergekit where the next column says so."
    )
