"""The command line: one command a job. JAX is imported only by the jobs that need it."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path

import click

from sdjax import __version__
from sdjax.errors import UserError

FOLDER = click.Path(path_type=Path, file_okay=False)
FILE = click.Path(path_type=Path, dir_okay=False)
FOLDER_OR_FILE = click.Path(path_type=Path)


class Interrupted(click.ClickException):
    """Ctrl-C or SIGTERM; the message says how to go on."""

    exit_code = 130

    def format_message(self) -> str:
        return f"interrupted; {self.message}"


class Group(click.Group):
    """Prints a user's mistake as one line and exits with 2; an interruption with 130."""

    def main(self, *args, **kwargs):
        signal.signal(signal.SIGTERM, _interrupt)
        try:
            return super().main(*args, **{**kwargs, "standalone_mode": False})
        except (UserError, Interrupted, KeyboardInterrupt, click.Abort) as error:
            status, line = _ending(error)
            click.echo(line, err=True)
            sys.exit(status)
        except click.ClickException as error:
            error.show()
            sys.exit(2)


def _ending(error: BaseException) -> tuple[int, str]:
    """Exit status and message of what ended a command."""
    if isinstance(error, UserError):
        return 2, f"sdjax: {error}"
    if isinstance(error, Interrupted):
        return error.exit_code, f"sdjax: {error.format_message()}"
    if isinstance(error, KeyboardInterrupt | click.Abort):
        return 130, "sdjax: interrupted"
    return 1, "".join(traceback.format_exception(error)).rstrip()


def _interrupt(number: int, frame: object) -> None:
    raise KeyboardInterrupt


def _example(text: str) -> str:
    return f"\b\nExample:\n  {text}"


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="sdjax")
def main() -> None:
    """Language models that invent algorithms to improve language models."""


@main.command(epilog=_example("sdjax demo"))
@click.option("--out", type=FOLDER, help="Folder of the run; a new one below runs/ by default.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Overrides the config."
)
def demo(out: Path | None, overrides: tuple[str, ...]) -> None:
    """Run the whole loop on the tiny models that ship with the package."""
    out = out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    _run("configs/demo.yaml", out, overrides)


@main.command(epilog=_example("sdjax run configs/demo.yaml --out runs/first --set random=1"))
@click.argument("config", required=False)
@click.option("--out", type=FOLDER, help="Folder of a new run.")
@click.option("--resume", type=FOLDER, help="Goes on with the run in this folder.")
@click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Overrides the config."
)
def run(
    config: str | None, out: Path | None, resume: Path | None, overrides: tuple[str, ...]
) -> None:
    """Search for merge algorithms as CONFIG says."""
    if resume is not None:
        if config or out or overrides:
            raise UserError("--resume takes a folder and nothing else: its run has its own config")
        _resume(resume)
        return
    if config is None or out is None:
        raise UserError("run needs a config and --out DIR, or --resume DIR")
    _run(config, out, overrides)


def _run(config: str, out: Path, overrides: tuple[str, ...]) -> None:
    with _one_run(out):
        from sdjax.search.reading import read_config
        from sdjax.sharding.distributed import is_main_process

        settings = read_config(config, overrides)
        if is_main_process() and out.exists() and any(out.iterdir()):
            raise UserError(
                f"{out}: is not empty; choose another --out, "
                f"or go on with its run by --resume {out}"
            )
        _loop(settings, out)


def _resume(folder: Path) -> None:
    with _one_run(folder):
        from sdjax.search.processes import stored_config

        _loop(stored_config(folder), folder)


@contextmanager
def _one_run(folder: Path) -> Iterator[None]:
    """Joins the processes of a run, where there are several, and lets them end together."""
    from sdjax.sharding.distributed import start_distributed
    from sdjax.sharding.together import ending_together

    start_distributed()
    signal.signal(signal.SIGTERM, _interrupt)  # joining others, JAX takes it for itself
    with ending_together(_ending):
        try:
            yield
        except KeyboardInterrupt:
            from sdjax.search import database

            begun = (folder / database.FILE).exists()
            hint = f"go on with: sdjax run --resume {folder}" if begun else "nothing was begun yet"
            raise Interrupted(hint) from None


def _loop(settings, folder: Path) -> None:
    from sdjax.search.loop import run as run_loop
    from sdjax.sharding.distributed import is_main_process

    def say(line: str) -> None:
        if is_main_process():
            click.echo(line)

    run_loop(settings, folder, say=say)
    if is_main_process():
        _report(folder)


@main.command(epilog=_example("sdjax report runs/first"))
@click.argument("folder", type=FOLDER)
def report(folder: Path) -> None:
    """Write the report of a run anew, finished or not, and print its tables."""
    _report(folder)


def _report(folder: Path) -> None:
    from rich.console import Console

    from sdjax.report import final_table, write_report
    from sdjax.search.store import Store

    with Store.open(folder) as store:
        for setting in store.settings():
            Console().print(final_table(store, setting.name))
        click.echo(f"report: {write_report(store, folder / 'report.html')}")


@main.command(
    epilog=_example("sdjax merge recipe.yaml merged/")
    + "\n  sdjax merge --algorithm mine.py --base zoo:seed --expert expert_1=zoo:reader merged/"
    + "\n  sdjax merge --run runs/first --rank 1 merged/"
)
@click.argument("paths", nargs=-1, required=True, metavar="[RECIPE] OUT", type=FOLDER_OR_FILE)
@click.option("--seed", default=0, show_default=True, help="Of random methods.")
@click.option("--algorithm", type=FILE, help="A program of the algorithm API, admitted first.")
@click.option("--base", metavar="MODEL", help="With --algorithm: what task vectors start from.")
@click.option("--expert", "experts", multiple=True, metavar="NAME=MODEL", help="With --algorithm.")
@click.option("--scope", default="mlp", show_default=True, help="With --algorithm: which tensors.")
@click.option("--run", type=FOLDER, help="Applies a program that this run has discovered.")
@click.option("--rank", type=click.IntRange(min=1), help="With --run: its place. [default: 1]")
def merge(
    paths: tuple[Path, ...],
    seed: int,
    algorithm: Path | None,
    base: str | None,
    experts: tuple[str, ...],
    scope: str,
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
    if algorithm is None and (base or experts):
        raise UserError("--base and --expert belong to --algorithm FILE")
    if rank is not None and run is None:
        raise UserError("--rank belongs to --run DIR")
    from sdjax.progress import progress_bar

    with progress_bar("merge", None) as advance:
        shown = 0

        def on_tensor(done: int, total: int, name: str) -> None:
            nonlocal shown
            advance(done - shown, description=f"merge {done} of {total} tensors")
            shown = done

        out = paths[-1]
        if algorithm is not None:
            from sdjax.programs.apply import merge_program

            if base is None:
                raise UserError("--algorithm needs --base MODEL")
            named = _named_experts(experts)
            written = merge_program(
                algorithm, base, named, out, scope=scope, seed=seed, on_tensor=on_tensor
            )
        elif run is not None:
            from sdjax.search.apply import merge_discovered

            written = merge_discovered(run, rank or 1, out, on_tensor=on_tensor)
        else:
            from sdjax.algorithms.registry import methods as all_methods
            from sdjax.merging.run import merge_recipe

            written = merge_recipe(paths[0], out, all_methods(), seed=seed, on_tensor=on_tensor)
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


@main.command(
    name="eval",
    epilog=_example("sdjax eval MODEL --task gsm8k --data gsm8k_test.jsonl --out scores/model")
    + "\n  sdjax eval zoo:seed --task arithmetic --limit 200"
    + "\n  sdjax eval --compare scores/model scores/merged",
)
@click.argument("model", required=False)
@click.option(
    "--task",
    default="arithmetic",
    show_default=True,
    help="arithmetic, gsm8k, math, svamp, a JSONL file, or module:Class.",
)
@click.option("--data", type=FOLDER_OR_FILE, help="The problems; the Hugging Face hub's otherwise.")
@click.option("--shots", type=click.IntRange(min=0), help="Worked examples before each problem.")
@click.option(
    "--split",
    type=click.Choice(["development", "test", "all"]),
    help="As a run divides the problems; by default all test problems.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Scores the first so many problems.")
@click.option("--chat", is_flag=True, help="Puts problems by the tokenizer's chat template.")
@click.option("--max-new-tokens", type=click.IntRange(min=1), help="The longest answer.")
@click.option("--out", type=FOLDER, help="Keeps results here; goes on where it was interrupted.")
@click.option(
    "--compare",
    nargs=2,
    type=FOLDER_OR_FILE,
    metavar="A B",
    help="Compares two --out folders (or their results.jsonl) problem by problem.",
)
@click.option(
    "--allow-missing",
    multiple=True,
    metavar="LAYER",
    help="Goes on where this machine lacks that layer of a grader's confinement.",
)
def evaluate(
    model: str | None,
    task: str,
    out: Path | None,
    compare: tuple[Path, Path] | None,
    **options,
) -> None:
    """Score MODEL (a folder, a name on Hugging Face, or zoo:NAME) on a task."""
    if compare is not None:
        if model is not None:
            raise UserError("--compare takes two results and no model")
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


@main.command(epilog=_example("sdjax check program.py --json"))
@click.argument("files", type=FILE, nargs=-1, required=True)
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
    from sdjax.io.checkpoint import read_config
    from sdjax.io.folders import model_folder
    from sdjax.merging.engine import default_slots
    from sdjax.models.spec import kind_of, specify
    from sdjax.sandbox.check import check_files
    from sdjax.sandbox.contract import Contract

    described = Path(model)
    folder = described.parent if described.name == "config.json" else model_folder(model)
    specs = specify(read_config(folder))
    tensors = {path: (kind_of(path), spec.shape) for path, spec in specs.items()}
    contract = Contract.of(default_slots(experts), tensors)
    text, status = check_files(
        files, contract, as_json=as_json, show=show, allow_missing=allow_missing
    )
    click.echo(text)
    sys.exit(status)


@main.command(epilog=_example("sdjax train dpo configs/train-dpo.yaml"))
@click.argument("kind", type=click.Choice(["sft", "dpo", "warmstart"]))
@click.argument("config", type=FILE)
def train(kind: str, config: Path) -> None:
    """Fine-tune a model as CONFIG says; called again, an interrupted training goes on.

    KIND is sft (texts), dpo (preferences), or warmstart (programs in the algorithm API, which a
    generator is to write).
    """
    from sdjax.search.preferences import preferences_of_run
    from sdjax.sharding.distributed import start_distributed
    from sdjax.training.job import train_model

    def say(line: str) -> None:
        click.echo(f"sdjax: {line}", err=True)

    start_distributed()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        click.echo(train_model(kind, config, read_run=preferences_of_run, say=say))
    except KeyboardInterrupt:
        raise Interrupted(f"go on with: sdjax train {kind} {config}") from None


@main.group(name="zoo", epilog=_example("sdjax zoo list"))
def zoo_group() -> None:
    """The tiny trained models that ship with the package."""


@zoo_group.command(name="list", epilog=_example("sdjax zoo list"))
def zoo_list() -> None:
    """Name and folder of every model."""
    from sdjax.io.folders import zoo_models

    for name, folder in zoo_models().items():
        click.echo(f"zoo:{name}\t{folder}")


@zoo_group.command(name="train", epilog=_example("sdjax zoo train --out my-zoo"))
@click.option("--out", type=FOLDER, required=True, help="A new folder.")
def zoo_train(out: Path) -> None:
    """Rebuild the zoo from nothing: about half an hour on two cores."""
    from sdjax.progress import progress_bar
    from sdjax.zoo.train import train_zoo

    with progress_bar("zoo", 100) as advance:
        shown = 0.0

        def news(line: str, share: float) -> None:
            nonlocal shown
            advance(100 * share - shown, description=line)
            shown = 100 * share

        table = train_zoo(out, news)
    click.echo(f"{table}")


@main.command(epilog=_example("sdjax methods"))
def methods() -> None:
    """List the human-designed merge methods with parameters, defaults and mathematics."""
    from rich.console import Console
    from rich.table import Table

    from sdjax.algorithms.registry import methods as all_methods

    table = Table("method", "parameters", "mathematics", show_lines=True)
    for method in all_methods().values():
        parameters = ", ".join(
            f"{one.name}{'*' if one.type == 'per_expert' else ''}={one.default}"
            for one in method.parameters
        )
        table.add_row(method.name, parameters, method.mathematics)
    Console().print(table)
    click.echo(
        "* one number, or one for each expert. These are the defaults in Python and in a search, "
        "which follow the papers; a recipe's follow mergekit."
    )
