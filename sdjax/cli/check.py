"""`sdjax check`: judge candidate files in the sandbox, without weights."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from sdjax.cli.group import echo, examples
from sdjax.cli.open_algorithm import (
    not_found,
    source_of_method,
    wrong_number_of_experts,
)
from sdjax.cli.sandbox_options import (
    allow_missing_option,
    signature_from_options,
    signature_options,
)
from sdjax.core.text import cut_middle

if TYPE_CHECKING:
    from sdjax.sandbox.signature import MergeSignature
    from sdjax.sandbox.verdict import Verdict

# Widths of a table of one line per file.
_WIDTH, _FILE_WIDTH, _MESSAGE_WIDTH = 100, 26, 31


@click.command(
    epilog=examples("sdjax check mine.py --json", "sdjax check mine.py --run runs/first")
)
@click.argument("files", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per file.")
@click.option("--show", is_flag=True, help="Also print each verified array program.")
@signature_options(
    model="zoo:seed", run="Judge as this run did; replaces --model, --experts, --scope."
)
@allow_missing_option
def check(
    files: tuple[str, ...],
    as_json: bool,
    show: bool,
    allow_missing: tuple[str, ...],
    **options: Any,
) -> None:
    """Judge candidate FILES in the sandbox. The exit status is 1 if any is not admitted.

    The name of a shipped method (see `sdjax methods`) may be given in place of its file.
    """
    signature = signature_from_options(**options)
    text, status = check_files(
        files, signature, as_json=as_json, show=show, allow_missing=allow_missing
    )
    echo(text)
    sys.exit(status)


def check_files(
    files: Sequence[str],
    signature: MergeSignature,
    *,
    as_json: bool = False,
    show: bool = False,
    workers: int = 2,
    allow_missing: Collection[str] = (),
) -> tuple[str, int]:
    """Judge files in order; a file with the same identity as an earlier one is a duplicate.

    Args:
        files: source files of candidates, or names of shipped methods.
        signature: merge signature to judge against.
        as_json: return one JSON object per line instead of a table.
        show: also pretty-print the verified array programs.
        workers: number of files to trace concurrently.
        allow_missing: layers of confinement that this machine may lack.

    Returns:
        the report, and the exit status: 0 if every file is admitted, else 1.

    Raises:
        UserError: a file cannot be read, or a layer of confinement is missing.
    """
    from sdjax.core.progress import progress_bar
    from sdjax.sandbox.ir.pretty_print import pretty_print
    from sdjax.sandbox.sandbox import Sandbox

    names = list(files)
    sources = [_read(name, signature.limits.source_bytes) for name in names]
    workers = min(workers, max(1, len(names)))
    verdicts: list[tuple[str, Verdict]] = []
    with (
        Sandbox(signature, workers, allow_missing=allow_missing) as sandbox,
        progress_bar("check", len(names)) as advance,
    ):
        for index, verdict in sandbox.judge_all(sources, names=names):
            verdicts.append((names[index], _explained(names[index], verdict, signature)))
            advance()
    programs = {
        name: {"program": pretty_print(verdict.program)}
        for name, verdict in verdicts
        if show and verdict.program is not None
    }
    if as_json:
        layers = {"layers": list(sandbox.layers)}
        text = "\n".join(
            json.dumps(programs.get(name, {}) | {"file": name} | verdict_fields(verdict) | layers)
            for name, verdict in verdicts
        )
    else:
        listings = [f"{name}\n{listing['program']}" for name, listing in programs.items()]
        text = "\n\n".join([_table(verdicts), *listings])
    return text, 0 if all(verdict.admitted for _, verdict in verdicts) else 1


def _read(name: str, max_bytes: int) -> str:
    from sdjax.merging.methods.registry import methods
    from sdjax.programs.program_file import read_program

    if os.path.exists(name):
        return read_program(name, max_bytes)
    if name not in methods():
        raise not_found(name)
    return source_of_method(name)


def _explained(name: str, verdict: Verdict, signature: MergeSignature) -> Verdict:
    """Say so if a shipped method is refused because of the number of experts."""
    from sdjax.merging.methods.registry import methods

    if verdict.admitted or os.path.exists(name):
        return verdict
    problem = wrong_number_of_experts(name, len(signature.slots))
    if not problem:
        return verdict
    number = methods()[name].schema.min_models
    return replace(verdict, message=f"{problem}; use --experts {number}")


def verdict_fields(verdict: Verdict) -> dict[str, Any]:
    """Return a verdict as the fields of a JSON line."""
    return {
        "verdict": verdict.verdict,
        "rule": verdict.rule,
        "message": verdict.message,
        "identity": verdict.identity,
        "structure": verdict.structure,
        "cost": verdict.cost,
        "memory": verdict.memory,
        "requests": list(verdict.requests),
        "duplicate_of": verdict.duplicate_of,
        "similar_to": verdict.similar_to,
        "notes": list(verdict.notes),
    }


def _table(verdicts: Sequence[tuple[str, Verdict]]) -> str:
    """Return one line per file; messages that do not fit follow in full."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("file", "verdict", "cost", "identity", "message", box=None, pad_edge=False)
    for column in table.columns:
        column.no_wrap = True
    long_messages = []
    for name, verdict in verdicts:
        file = cut_middle(name, _FILE_WIDTH)
        cost = "" if verdict.cost is None else f"{verdict.cost:.3g}"
        message = verdict.message or ", ".join(verdict.remarks)
        if len(message) > _MESSAGE_WIDTH:
            long_messages.append(f"\n{name}:\n{message}")
            message = f"{message[: _MESSAGE_WIDTH - 1]}…"
        cells = (file, verdict.verdict, cost, (verdict.identity or "")[:12], message)
        table.add_row(*map(Text, cells))  # Text, because messages may contain markup
    output = io.StringIO()
    console = Console(file=output, width=_WIDTH, color_system=None)
    console.print(table)
    for text in long_messages:
        console.print(Text(text))
    return "\n".join(line.rstrip() for line in output.getvalue().rstrip("\n").split("\n"))
