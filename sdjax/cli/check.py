"""`sdjax check`: judge candidate files in the sandbox, without weights."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sdjax.cli.group import FILE_PATH, examples
from sdjax.cli.sandbox_options import (
    allow_missing_option,
    signature_from_options,
    signature_options,
)
from sdjax.core.errors import UserError

if TYPE_CHECKING:
    from sdjax.sandbox.signature import MergeSignature
    from sdjax.sandbox.verdict import Verdict


@click.command(epilog=examples("sdjax check mine.py --json"))
@click.argument("files", type=FILE_PATH, nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per file.")
@click.option("--show", is_flag=True, help="Also print each verified array program.")
@signature_options
@allow_missing_option
def check(
    files: tuple[Path, ...],
    as_json: bool,
    show: bool,
    allow_missing: tuple[str, ...],
    **options: Any,
) -> None:
    """Judge candidate FILES in the sandbox. The exit status is 1 if any is not admitted."""
    signature = signature_from_options(**options)
    text, status = check_files(
        files, signature, as_json=as_json, show=show, allow_missing=allow_missing
    )
    click.echo(text)
    sys.exit(status)


def check_files(
    files: Sequence[Path],
    signature: MergeSignature,
    *,
    as_json: bool = False,
    show: bool = False,
    workers: int = 2,
    allow_missing: Collection[str] = (),
) -> tuple[str, int]:
    """Judge files in order; a file with the same identity as an earlier one is a duplicate.

    Args:
        files: source files of candidates.
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

    names = [str(file) for file in files]
    sources = [_read(file, signature.limits.source_bytes) for file in files]
    workers = min(workers, max(1, len(names)))
    verdicts: list[tuple[str, Verdict]] = []
    with (
        Sandbox(signature, workers, allow_missing=allow_missing) as sandbox,
        progress_bar("check", len(names)) as advance,
    ):
        for index, verdict in sandbox.judge_all(sources, names=names):
            verdicts.append((names[index], verdict))
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


def _read(file: Path, max_bytes: int) -> str:
    try:
        with file.open("rb") as source:
            return source.read(max_bytes + 1).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); pass a Python file") from None


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
        "notes": list(verdict.notes),
    }


def _table(verdicts: Sequence[tuple[str, Verdict]]) -> str:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("file", "verdict", "cost", "identity", "message")
    for name, verdict in verdicts:
        cost = "" if verdict.cost is None else f"{verdict.cost:.3g}"
        message = verdict.message or ", ".join(verdict.notes)
        cells = (name, verdict.verdict, cost, (verdict.identity or "")[:12], message)
        table.add_row(*map(Text, cells))  # Text, because messages may contain markup
    output = io.StringIO()
    Console(file=output, width=120, color_system=None).print(table)
    return output.getvalue().rstrip("\n")
