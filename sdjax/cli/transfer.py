"""`sdjax transfer`: apply a run's best programs to other experts."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdjax.cli.device_options import dtype_option, mesh_option, parse_mesh
from sdjax.cli.group import FILE_PATH, FOLDER_PATH, examples
from sdjax.cli.named_values import parse_experts
from sdjax.cli.processes import joined_processes
from sdjax.cli.sandbox_options import (
    allow_missing_option,
    trust_code_option,
    trust_limits_option,
)
from sdjax.cli.search_options import search_options
from sdjax.core.errors import UserError

if TYPE_CHECKING:
    from sdjax.report.transfer import TransferResults
    from sdjax.search.transfer import Transfer, TransferOptions

_MAX_BYTES = 1_000_000_000  # of the results


@click.command(
    epilog=examples(
        "sdjax transfer runs/demo --expert expert_1=zoo:storyteller "
        "--expert expert_2=zoo:accountant --expert expert_3=zoo:detective",
        "sdjax transfer RUN --base MODEL --expert expert_1=A --expert expert_2=B --out found.json",
    ),
)
@click.argument("run", type=FOLDER_PATH)
@click.option(
    "--expert",
    "experts",
    multiple=True,
    metavar="NAME=MODEL",
    help="The model in place of an expert of the run. Repeat for each expert.",
)
@click.option(
    "--base", metavar="MODEL", help="What the experts are fine-tunes of.  [the run's seed]"
)
@click.option(
    "--top-k",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Number of the run's best programs.",
)
@click.option(
    "--limit", type=click.IntRange(min=1), help="Use at most this many problems per split."
)
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Maximum tokens per answer.  [default: the run's]",
)
@click.option("--batch", type=click.IntRange(min=1), help="Problems decoded at a time.")
@mesh_option
@dtype_option
@click.option(
    "--out",
    type=FILE_PATH,
    help="Write the results to this JSON file; an interrupted transfer resumes.",
)
@click.option(
    "--accept-versions",
    is_flag=True,
    help="Resume although versions of packages or weights differ.",
)
@click.option(
    "--tune",
    "families",
    multiple=True,
    metavar="FAMILY",
    help="Merge to tune with these experts, by the name that `sdjax tune` takes, such as weights, "
    "layers or ties. Repeatable.  [default: the run's tuned controls, or weights]",
)
@search_options(
    budget="Evaluations of the development problems for each --tune; 0 tunes nothing by search.  "
    "[default: the run's, or 20]",
    of_run=True,
)
@trust_code_option
@trust_limits_option
@allow_missing_option
def transfer(
    run: Path,
    experts: tuple[str, ...],
    out: Path | None,
    mesh: str | None,
    optimizer: str | None,
    steps: int | None,
    learning_rate: float | None,
    starts: int | None,
    **settings: Any,
) -> None:
    """Apply the best programs of RUN to other experts, and compare them with merge methods.

    The programs are applied as they are, to fine-tunes of the run's seed or, with --base, of any
    other model. Human-designed methods are applied as the run tuned them, and tuned on the
    development problems with these experts: over the run's grids, and by the searches of --tune.
    """
    from sdjax.search.transfer import TransferOptions

    search = {
        "optimizer": optimizer,
        "steps": steps,
        "learning_rate": learning_rate,
        "starts": starts,
    }
    options = TransferOptions(
        mesh=parse_mesh(mesh),
        search={name: value for name, value in search.items() if value is not None},
        **settings,
    )
    hint = "run the same command to resume" if out else "use --out FILE to make it resumable"
    with joined_processes(hint):
        _transfer(run, parse_experts(experts), out, options)


def _transfer(
    run: Path, experts: Mapping[str, str], out: Path | None, options: TransferOptions
) -> None:
    from sdjax.report.transfer import transfer_json, transfer_results
    from sdjax.search import transfer as job
    from sdjax.search.store import Store
    from sdjax.sharding.multihost import broadcast_from_main, is_main_process

    if out is not None and broadcast_from_main(lambda: bytes([out.exists()])) == b"\x01":
        results, result = _finished(run, experts, options, out)
        if is_main_process():
            _print(results, result)
        return
    with _results_folder(out) as folder:
        result = job.transfer(run, experts, folder, options)
        if not is_main_process():
            return
        with Store.open(folder) as store:
            results = transfer_results(store, result)
            data = transfer_json(store, results, result, run)
        if out is not None:
            from sdjax.io.atomic_write import write_file

            write_file(out, json.dumps(data, indent=1) + "\n")
    _print(results, result)


def _print(results: TransferResults, result: Transfer) -> None:
    from rich.console import Console

    from sdjax.report.terminal import TABLE_WIDTH
    from sdjax.report.transfer import transfer_table

    console = Console()
    width = console.width if console.is_terminal else TABLE_WIDTH
    Console(width=width).print(transfer_table(results, result, width=width))


def _finished(
    run: Path, experts: Mapping[str, str], options: TransferOptions, out: Path
) -> tuple[TransferResults, Transfer]:
    """Return the results in `out`.

    Raises:
        UserError: `out` contains something else than the results of this transfer.
    """
    from sdjax.core.files import read_json_file
    from sdjax.report.transfer import read_transfer
    from sdjax.search.transfer import plan_transfer, transfer_request

    other = UserError(f"{out}: exists; remove it, or choose another --out")
    try:
        data = read_json_file(out, _MAX_BYTES, non_finite=True)
    except (UserError, ValueError):
        raise other from None
    if not isinstance(data, dict) or "request" not in data:
        raise other
    winners, plan = plan_transfer(run, experts, options)
    found = read_transfer(data, winners, transfer_request(winners, plan), plan.config)
    if found is None:
        raise other
    return found


@contextmanager
def _results_folder(out: Path | None) -> Iterator[Path]:
    """Yield the folder of the results; it remains after an interruption if there is an `out`."""
    if out is None:
        with tempfile.TemporaryDirectory(prefix="sdjax-transfer-") as temporary:
            yield Path(temporary)
        return
    from sdjax.io.links import check_own_folder
    from sdjax.sharding.multihost import is_main_process

    folder = out.with_name(f".{out.name}.store")
    check_own_folder(folder)
    yield folder
    if is_main_process():
        shutil.rmtree(folder, ignore_errors=True)
