"""`sdjax merge`: merge models on disk by a recipe, an algorithm file or a run's candidate."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdjax.cli.group import ANY_PATH, FOLDER_PATH, echo, examples
from sdjax.cli.interrupts import resume_hint
from sdjax.cli.merge_discovered import merge_discovered
from sdjax.cli.mergekit_options import mergekit_options, out_shard_size_option
from sdjax.cli.named_values import parse_experts, parse_named
from sdjax.cli.open_algorithm import (
    judged_algorithm,
    open_algorithm,
    param_option,
    parse_parameters,
)
from sdjax.cli.sandbox_options import SCOPE_HELP, allow_missing_option, trust_limits_option
from sdjax.core.errors import UserError
from sdjax.io.atomic_write import resolve_new_folder

if TYPE_CHECKING:
    from sdjax.core.progress import Advance
    from sdjax.merging.algorithm import Algorithm
    from sdjax.merging.recipe.pipeline import MergeResult, OnTensor
    from sdjax.merging.recipe.recipe_method import Tensors
    from sdjax.merging.scope import Scope


@click.command(
    epilog=examples(
        "sdjax merge recipe.yaml merged/",
        "sdjax merge --algorithm mine.py --base zoo:seed --expert expert_1=zoo:reader merged/",
        "sdjax merge --run runs/first --rank 1 merged/",
    ),
)
@click.argument("paths", nargs=-1, required=True, metavar="[RECIPE] OUT", type=ANY_PATH)
@click.option(
    "--seed",
    "--random-seed",
    type=int,
    help="Seed of random methods; a run uses its own. [default: 0]",
)
@click.option(
    "--algorithm",
    metavar="FILE|METHOD",
    help="A Python file in the algorithm API, which the sandbox checks, or a shipped method.",
)
@param_option
@click.option("--base", metavar="MODEL", help="With --algorithm: the base model.")
@click.option(
    "--expert", "experts", multiple=True, metavar="NAME=MODEL", help="With --algorithm: an expert."
)
@click.option(
    "--stats",
    multiple=True,
    metavar="NAME=DIR",
    help="With --algorithm: statistics of an expert on data, for fisher and regmean.  [default: "
    "MODEL.stats]",
)
@click.option(
    "--scope",
    metavar="SCOPE",
    help=f"With --algorithm: {SCOPE_HELP}",
)
@click.option("--run", type=FOLDER_PATH, help="Use a program discovered by this run.")
@click.option(
    "--rank", type=click.IntRange(min=1), help="With --run: the program's rank. [default: 1]"
)
@click.option(
    "--allow-crimes",
    is_flag=True,
    help="Merge models whose configs say different architectures, if their tensors fit.",
)
@click.option("--overwrite", is_flag=True, help="Replace OUT if it is a model's folder.")
@click.option(
    "--intermediate-dir",
    "-I",
    "intermediate",
    type=FOLDER_PATH,
    help="With several recipes in RECIPE: folder of the named results.  [default: OUT.parts]",
)
@click.option("--quiet/--no-quiet", "-q", help="Show no progress.")
@out_shard_size_option
@mergekit_options
@trust_limits_option
@allow_missing_option
def merge(
    paths: tuple[Path, ...],
    seed: int | None,
    algorithm: str | None,
    parameters: tuple[str, ...],
    base: str | None,
    experts: tuple[str, ...],
    stats: tuple[str, ...],
    scope: str | None,
    run: Path | None,
    rank: int | None,
    allow_crimes: bool,
    overwrite: bool,
    intermediate: Path | None,
    quiet: bool,
    out_shard_size: int | None,
    trust_limits: bool,
    allow_missing: tuple[str, ...],
) -> None:
    """Merge models into the folder OUT, which appears only when it is complete.

    RECIPE is a YAML file in mergekit's format, also with several recipes that use one another's
    results. Run the same command again to resume an interrupted merge.
    """
    if len(paths) != (2 if algorithm is None and run is None else 1):
        raise UserError(
            "merge takes RECIPE OUT, or OUT alone with --algorithm FILE|METHOD or --run DIR"
        )
    if algorithm is not None and run is not None:
        raise UserError("merge takes --algorithm or --run, not both")
    if algorithm is None and (base or experts or parameters or stats or scope is not None):
        raise UserError(
            "--base, --expert, --param, --stats and --scope require --algorithm FILE|METHOD"
        )
    if rank is not None and run is None:
        raise UserError("--rank requires --run DIR")
    if trust_limits and run is None:
        raise UserError("--trust-limits requires --run DIR")
    if seed is not None and run is not None:
        raise UserError("--seed cannot be used with --run DIR, which uses the run's own seed")
    if algorithm is not None and base is None:
        raise UserError("--algorithm requires --base MODEL")
    if len(paths) == 2 and paths[0].suffix == ".py":
        raise UserError(
            f"{paths[0]}: a Python file is not a recipe; use --algorithm {paths[0]} --base MODEL "
            "--expert NAME=MODEL OUT"
        )
    if intermediate is not None and len(paths) == 1:
        raise UserError("--intermediate-dir requires RECIPE")
    out = paths[-1]
    with resume_hint("run the same command again to resume the merge"), _progress() as on_tensor:
        options: dict[str, Any] = {
            "allow_crimes": allow_crimes,
            "overwrite": overwrite,
            "on_tensor": None if quiet else on_tensor,
            **({} if out_shard_size is None else {"max_file_bytes": out_shard_size}),
        }
        if algorithm is not None or run is not None or out.is_file():
            resolve_new_folder(out, overwrite=overwrite)  # before a program is judged
        if algorithm is not None:
            result = merge_algorithm_file(
                algorithm,
                base or "",
                parse_experts(experts),
                out,
                parameters=parse_parameters(parameters),
                scope=scope or "all",
                seed=seed or 0,
                allow_missing=allow_missing,
                stats=parse_named(stats, "--stats", "expert_1=reader.stats"),
                **options,
            )
            _report(result)
        elif run is not None:
            result = merge_discovered(
                run,
                rank or 1,
                out,
                trust_limits=trust_limits,
                allow_missing=allow_missing,
                **options,
            )
            _report(result)
        else:
            from sdjax.merging.recipe.documents import recipe_targets
            from sdjax.merging.recipe.pipeline import merge_recipe

            load_program = partial(_judge_program, allow_missing=allow_missing)
            for recipe, target in recipe_targets(paths[0], out, intermediate):
                result = merge_recipe(
                    recipe, target, seed=seed or 0, load_program=load_program, **options
                )
                _report(result)


def _report(result: MergeResult) -> None:
    """Print the notes and the summary of a merge."""
    for note in result.notes:
        echo(f"sdjax: {note}", err=True)
    resumed = f" ({result.resumed} by an earlier attempt)" if result.resumed else ""
    echo(f"{result.folder}: {result.coverage}{resumed}; {result.bytes / 1e6:,.1f} MB")


@contextmanager
def _progress() -> Iterator[OnTensor]:
    """Yield a function that shows the progress of a merge, whose total it learns when called."""
    from sdjax.core.progress import progress_bar

    with ExitStack() as stack:
        advance: Advance | None = None
        last = 0

        def on_tensor(done: int, total: int) -> None:
            nonlocal advance, last
            if advance is None or done < last:  # the first merge, or the next one
                bar = progress_bar("merge", total, completed=done)
                advance = stack.enter_context(bar)
            else:
                advance(done - last)
            last = done

        yield on_tensor


def merge_algorithm_file(
    name: str,
    base: str,
    experts: Mapping[str, str],
    out: Path,
    *,
    parameters: Mapping[str, Any] | None = None,
    scope: Scope = "all",
    seed: int = 0,
    allow_missing: Collection[str] = (),
    stats: Mapping[str, str] | None = None,
    **options: Any,
) -> MergeResult:
    """Merge experts into a base with the algorithm in a Python file, or with a shipped method.

    This process never executes the file itself, only the array programs that the sandbox has
    verified.

    Args:
        name: Python file that defines `merge_models` or `merge_trees`, or a method's name.
        base: the base model.
        experts: mapping from name in `task_vectors` to model.
        out: folder of the result.
        parameters: values of hyperparameters by name.
        scope: tensors to merge; all others are copied from the base.
        seed: random seed.
        allow_missing: layers of confinement that this machine may lack.
        stats: name to folder of the expert's statistics, for methods that need them.
        options: as in `merge_algorithm`.

    Raises:
        UserError: the program is refused (the message says why), or see `merge_recipe`.
    """
    import jax

    from sdjax.merging.recipe.from_algorithm import merge_algorithm, open_models
    from sdjax.merging.recipe.model_card import PROGRAM, Provenance
    from sdjax.programs.signature import merge_signature, merge_trial

    if not experts:
        raise UserError("--algorithm requires at least one --expert NAME=MODEL")
    models = open_models(base, experts, Path.cwd())
    parameters = parameters or {}
    algorithm, source = open_algorithm(
        name,
        merge_signature(models, scope),
        parameters=parameters,
        allow_missing=allow_missing,
        trial=merge_trial(models, scope),
    )
    return merge_algorithm(
        algorithm,
        models,
        scope,
        out,
        provenance=Provenance(
            method=Path(name).name, file=PROGRAM, text=source, seed=seed, parameters=parameters
        ),
        key=jax.random.key(seed),
        stats=stats,
        **options,
    )


def _judge_program(
    file: Path,
    slots: Sequence[str],
    tensors: Tensors,
    parameters: Mapping[str, Any],
    *,
    allow_missing: Collection[str],
) -> tuple[Algorithm, str]:
    """Judge the program file of a recipe; see `LoadProgram`."""
    import jax

    from sdjax.sandbox.merge_trial import MergeTrial, TrialTensor
    from sdjax.sandbox.signature import MergeSignature
    from sdjax.sharding.memory import memory_of

    shapes = {path: (kind, shape) for path, (kind, shape, _) in tensors.items()}
    trial = MergeTrial(
        memory=memory_of(jax.devices()),
        tensors=tuple(
            TrialTensor(path=path, shape=shape, base=dtype, experts=(dtype,) * len(slots))
            for path, (_, shape, dtype) in tensors.items()
        ),
        compiler="single use",
    )
    return judged_algorithm(
        file,
        MergeSignature.of(slots, shapes),
        parameters=parameters,
        allow_missing=allow_missing,
        trial=trial,
    )
