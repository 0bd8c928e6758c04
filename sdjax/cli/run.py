"""`sdjax run`: search for merge algorithms."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sdjax.cli.group import FOLDER_PATH, echo, examples
from sdjax.cli.processes import joined_processes
from sdjax.cli.report import print_report
from sdjax.cli.sandbox_options import (
    allow_missing_option,
    allow_missing_override,
    trust_code_option,
    trust_limits_option,
)
from sdjax.core.errors import UserError

if TYPE_CHECKING:
    from sdjax.search.config import RunConfig

overrides_option = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the config."
)


def limit_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add --max-hours and --max-programs to a command."""
    hours = click.option(
        "--max-hours",
        type=click.FloatRange(min=0, min_open=True),
        metavar="H",
        help="End the search after so many hours, earlier starts of the run included; then test "
        "what it has found. [default: limits.max_hours of the config]",
    )
    programs = click.option(
        "--max-programs",
        type=click.IntRange(min=1),
        metavar="N",
        help="End the search after so many sampled programs; then test what it has found. "
        "[default: limits.max_programs of the config]",
    )
    return hours(programs(command))


def limit_overrides(max_hours: float | None, max_programs: int | None) -> tuple[str, ...]:
    """Return the overrides of the config that the limits on the command line stand for."""
    limits = {"max_hours": max_hours, "max_programs": max_programs}
    return tuple(f"limits.{key}={value}" for key, value in limits.items() if value is not None)


dry_run_option = click.option(
    "--dry-run", is_flag=True, help="Check the run and announce it, but compute and write nothing."
)


@click.command(
    epilog=examples(
        "sdjax run configs/demo.yaml --out runs/first --set rng_seed=1",
        "sdjax run --resume runs/first",
        "sdjax run --resume runs/first --set iterations=5 --max-hours 2",
    )
)
@click.argument("config", required=False)
@click.option("--out", type=FOLDER_PATH, help="Folder of the new run.")
@click.option(
    "--resume",
    type=FOLDER_PATH,
    help="Resume the run in this folder; --set extends it, such as by more iterations.",
)
@overrides_option
@click.option(
    "--accept-versions",
    is_flag=True,
    help="Resume although versions of packages, weights or data differ; the run records it.",
)
@limit_options
@dry_run_option
@trust_code_option
@trust_limits_option
@allow_missing_option
def run(
    config: str | None,
    out: Path | None,
    resume: Path | None,
    overrides: tuple[str, ...],
    accept_versions: bool,
    max_hours: float | None,
    max_programs: int | None,
    dry_run: bool,
    trust_code: bool,
    trust_limits: bool,
    allow_missing: tuple[str, ...],
) -> None:
    """Search for merge algorithms.

    CONFIG is a YAML file, or the name of a config that ships with the package.
    """
    overrides += limit_overrides(max_hours, max_programs)
    overrides += allow_missing_override(allow_missing)
    if resume is not None:
        if config or out:
            raise UserError(
                "--resume takes the run's own config and folder: remove CONFIG and --out"
            )
        resume_run(
            resume,
            overrides,
            accept_versions=accept_versions,
            dry_run=dry_run,
            trust_code=trust_code,
            trust_limits=trust_limits,
        )
        return
    for option, given in (("--accept-versions", accept_versions), ("--trust-limits", trust_limits)):
        if given:
            raise UserError(f"{option} requires --resume DIR")
    if config is None or (out is None and not dry_run):
        raise UserError("run requires CONFIG and --out DIR, or --resume DIR")
    start_run(config, out, overrides, dry_run=dry_run, trust_code=trust_code)


def start_run(
    config: str,
    out: Path | None,
    overrides: tuple[str, ...],
    *,
    dry_run: bool = False,
    trust_code: bool = False,
) -> None:
    """Start a run in a new folder; a dry run needs none."""
    with _joined_processes(out, trust_code=trust_code) as options:
        from sdjax.search.announcement import check_new_folder
        from sdjax.search.config import read_config
        from sdjax.search.limits import contacted_endpoints, raised_limits
        from sdjax.sharding.multihost import is_main_process

        run_config = read_config(config, overrides)
        if raised_limits(run_config.sandbox) or contacted_endpoints(run_config):
            options.append("--trust-limits")
        if out is None or dry_run:
            _announce(run_config, out, resume=False, trust_code=trust_code)
            return
        if is_main_process():
            check_new_folder(out)
        _search(run_config, out, trust_code=trust_code)


def resume_run(
    folder: Path,
    overrides: tuple[str, ...] = (),
    *,
    accept_versions: bool = False,
    dry_run: bool = False,
    trust_code: bool = False,
    trust_limits: bool = False,
) -> None:
    """Resume the run in a folder, with changed keys of its config."""
    with _joined_processes(folder, trust_code=trust_code) as options:
        from sdjax.search.multihost import stored_config

        config = stored_config(folder, overrides, trust_limits=trust_limits)
        if trust_limits:
            options.append("--trust-limits")
        if dry_run:
            _announce(
                config,
                folder,
                resume=True,
                accept_versions=accept_versions,
                trust_code=trust_code,
            )
        else:
            _search(config, folder, accept_versions=accept_versions, trust_code=trust_code)


@contextmanager
def _joined_processes(folder: Path | None, *, trust_code: bool) -> Iterator[list[str]]:
    """Join the processes of a distributed run and make them exit together.

    Yields:
        options of the command that resumes the run, for the advice after an interrupt.
    """
    options = ["--trust-code"] if trust_code else []

    def hint() -> str:
        from sdjax.search.attempts import DATABASE_FILE

        started = folder is not None and (folder / DATABASE_FILE).exists()
        command = shlex.join(["sdjax", "run", "--resume", str(folder), *options])
        return f"resume with: {command}" if started else "nothing was saved"

    with joined_processes(hint):
        yield options


def _announce(
    config: RunConfig,
    folder: Path | None,
    *,
    resume: bool,
    accept_versions: bool = False,
    trust_code: bool,
) -> None:
    from sdjax.search.announcement import dry_run
    from sdjax.sharding.multihost import is_main_process

    lines = dry_run(
        config, folder, resume=resume, accept_versions=accept_versions, trust_code=trust_code
    )
    if is_main_process():
        echo("\n".join(lines))


def _search(
    config: RunConfig, folder: Path, *, accept_versions: bool = False, trust_code: bool = False
) -> None:
    from sdjax.search.loop import run_search
    from sdjax.sharding.multihost import is_main_process

    run_search(config, folder, accept_versions=accept_versions, trust_code=trust_code)
    if is_main_process():
        print_report(folder)
