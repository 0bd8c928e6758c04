"""`sdjax check FILE…`: judge program files without any weights."""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.sandbox.ir.pretty_print import pretty_print
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature
from sdjax.sandbox.verdict import Verdict


def check_files(
    paths: Sequence[str | Path],
    signature: MergeSignature,
    *,
    as_json: bool,
    show: bool = False,
    workers: int = 2,
    allow_missing: Collection[str] = (),
) -> tuple[str, int]:
    """(what to print, exit status: 0 where every file is admitted, else 1).

    Files are judged in order, and one that equals an earlier one is a duplicate of it. As JSON:
    one object a line with file, verdict, rule, message, hash, structure, cost, memory, requests,
    duplicate_of, notes and layers. With `show`, the array programs as well, in readable form.
    Raises UserError for a file that cannot be read, and for a missing layer of confinement that
    `allow_missing` does not name.
    """
    files = [str(path) for path in paths]
    sources = [_read(file, signature.limits.source_bytes) for file in files]
    workers = min(workers, max(1, len(files)))
    verdicts = []
    with (
        Sandbox(signature, workers, allow_missing=allow_missing) as sandbox,
        progress_bar("check", len(files)) as advance,
    ):
        for _, verdict in sandbox.judge_all(sources, names=files):
            verdicts.append(verdict)
            advance()
    rows = list(zip(files, verdicts, strict=True))
    programs = {f: pretty_print(v.ir, signature) for f, v in rows if show and v.ir is not None}
    if as_json:
        text = "\n".join(_as_json(*row, sandbox.layers, programs) for row in rows)
    else:
        shown = [f"{file}\n{program}" for file, program in programs.items()]
        text = "\n\n".join([_as_table(rows), *shown])
    return text, 0 if all(v.admitted for v in verdicts) else 1


def _read(file: str, most: int) -> str:
    try:
        with Path(file).open("rb") as source:
            return source.read(most + 1).decode("utf-8-sig", "surrogateescape")
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); give a program file") from None


def _as_json(
    file: str, verdict: Verdict, layers: Sequence[str], programs: Mapping[str, str]
) -> str:
    program = {"program": programs[file]} if file in programs else {}
    return json.dumps(
        program
        | {
            "file": file,
            "verdict": verdict.verdict,
            "rule": verdict.rule,
            "message": verdict.message,
            "hash": verdict.identity,
            "structure": verdict.structure,
            "cost": verdict.cost,
            "memory": verdict.memory,
            "requests": list(verdict.requests),
            "duplicate_of": verdict.duplicate_of,
            "notes": list(verdict.notes),
            "layers": list(layers),
        }
    )


def _as_table(rows: Sequence[tuple[str, Verdict]]) -> str:
    table = Table("file", "verdict", "cost", "hash", "message")
    for file, verdict in rows:
        cost = "" if verdict.cost is None else f"{verdict.cost:.3g}"
        message = verdict.message or ", ".join(verdict.notes)
        cells = (file, verdict.verdict, cost, (verdict.identity or "")[:12], message)
        table.add_row(*map(Text, cells))  # a program's words are no markup
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(table)
    return console.file.getvalue().rstrip("\n")  # type: ignore[attr-defined]
