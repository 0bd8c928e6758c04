"""Options shared by the commands that run programs in the sandbox."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import click

from sdjax.cli.group import FOLDER_PATH
from sdjax.core.errors import UserError

if TYPE_CHECKING:
    from sdjax.sandbox.signature import MergeSignature

Command = TypeVar("Command", bound=Callable)

allow_missing_option = click.option(
    "--allow-missing",
    multiple=True,
    metavar="LAYER",
    help="Run even if this machine lacks this layer of confinement, such as landlock. Repeatable.",
)

SCOPE_HELP = (
    "tensors to merge: all, mlp, attention, or a glob pattern over tensor paths.  [default: all]"
)

trust_code_option = click.option(
    "--trust-code",
    is_flag=True,
    help="Import the task's class (module:Class), whose code runs outside the sandbox.",
)


trust_limits_option = click.option(
    "--trust-limits",
    is_flag=True,
    help="Use limits of the run's folder that are above the defaults, and its endpoints.",
)


def allow_missing_override(layers: Sequence[str]) -> tuple[str, ...]:
    """Return the override of a run's config for the layers of `--allow-missing`, if any."""
    return (f"sandbox.allow_missing=[{', '.join(layers)}]",) if layers else ()


def signature_options(*, model: str, run: str) -> Callable[[Command], Command]:
    """Return a decorator that adds the options of `signature_from_options` to a command.

    They are --model, --experts, --scope, --run and --trust-limits.

    Args:
        model: the default of --model, for the help text.
        run: help text of --run.
    """
    options = (
        trust_limits_option,
        click.option("--run", type=FOLDER_PATH, help=run),
        click.option("--scope", metavar="SCOPE", help=SCOPE_HELP.replace("tensors", "Tensors", 1)),
        click.option(
            "--experts", type=click.IntRange(1, 64), help="Number of experts.  [default: 3]"
        ),
        click.option(
            "--model",
            metavar="MODEL",
            help=f"Model to merge into: MODEL, MODEL+ADAPTER or a config.json.  [default: {model}]",
        ),
    )

    def decorate(command: Command) -> Command:
        for option in options:
            command = option(command)
        return command

    return decorate


def signature_from_options(
    *,
    model: str | None,
    experts: int | None,
    scope: str | None,
    run: Path | None,
    trust_limits: bool = False,
) -> MergeSignature:
    """Return the merge signature that programs are judged against.

    Args:
        model: a model's name, with an adapter if any, or its config.json; by default zoo:seed.
        experts: number of experts, named expert_1 ... expert_k; by default three.
        scope: the tensors to merge; by default all, as in `sdjax merge --algorithm`.
        run: a run's folder. Its slots, scope and limits are used, so that identities are the run's.
        trust_limits: use limits of the run that are above the defaults.

    Raises:
        UserError: no such model or run, a scope that matches nothing, `run` with other options, or
            limits of the run that are not trusted.
    """
    from sdjax.io.hf_checkpoint import load_config
    from sdjax.merging.engine import default_slots
    from sdjax.programs.signature import model_signature

    if run is None:
        if trust_limits:
            raise UserError("--trust-limits requires --run DIR")
        name = model or "zoo:seed"
        config = load_config(Path(name).parent if Path(name).name == "config.json" else name)
        return model_signature(config, default_slots(experts or 3), scope or "all")
    for name, value in (("--model", model), ("--experts", experts), ("--scope", scope)):
        if value is not None:
            raise UserError(f"--run judges as the run did; remove {name}")
    from sdjax.search.limits import limits_of_run
    from sdjax.search.store import Store

    with Store.open(run) as store:
        of_run = store.config()
    limits = limits_of_run(of_run, run, trusted=trust_limits)
    return model_signature(load_config(of_run.seed), of_run.slots, of_run.scope, limits)
