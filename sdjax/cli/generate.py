"""`sdjax generate`: sample programs or any text from a model, and judge the programs."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import click

from sdjax.cli.check import verdict_fields
from sdjax.cli.device_options import mesh_option, parse_mesh
from sdjax.cli.group import FILE_PATH, echo, examples
from sdjax.cli.interrupts import resume_hint
from sdjax.cli.sandbox_options import (
    allow_missing_option,
    signature_from_options,
    signature_options,
)
from sdjax.core.errors import UserError

if TYPE_CHECKING:
    from sdjax.sandbox.signature import MergeSignature
    from sdjax.search.sampling import GeneratedSample, PromptedGenerator

NO_PROGRAM = "no program"


@click.command(
    epilog=examples(
        "sdjax generate zoo:seed --prompt short -n 20 --check",
        "sdjax generate zoo:seed+runs/first/adapters/iteration-1 --prompt mine.txt",
        "sdjax generate --run runs/first -n 100 --check --out samples.jsonl",
    )
)
@click.argument("generator", required=False, metavar="[MODEL[+ADAPTER]]")
@click.option(
    "--prompt",
    metavar="FILE|NAME",
    help="File, or shipped prompt: full, full-memory, short or short-memory.  [default: full; the "
    "run's]",
)
@click.option(
    "-n",
    "--samples",
    type=click.IntRange(1, 1_000_000),
    default=10,
    show_default=True,
    help="Number of samples.",
)
@click.option("--check", is_flag=True, help="Judge the program of each sample in the sandbox.")
@click.option("--temperature", type=float, help="0 is greedy.  [default: 1; the run's]")
@click.option("--top-p", type=float, help="Nucleus sampling threshold.  [default: 1; the run's]")
@click.option(
    "--max-new-tokens",
    type=click.IntRange(min=1),
    help="Maximum tokens per sample.  [default: up to 512; the run's]",
)
@click.option(
    "--rng-seed",
    type=click.IntRange(0, (1 << 32) - 1),
    help="Seed of the random numbers.  [default: 0; the run's]",
)
@click.option(
    "--iteration",
    type=click.IntRange(1, (1 << 32) - 1),
    help="Iteration whose samples to draw.  [default: 1; with --run, that of the newest generator]",
)
@click.option(
    "--slots",
    type=click.IntRange(min=1),
    help="Samples decoded at a time.  [default: up to 32; the run's]",
)
@mesh_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per sample.")
@click.option(
    "--out", type=FILE_PATH, help="Write one JSON object per sample to this file instead."
)
@signature_options(
    model="the MODEL that samples",
    run="Use the generator, the prompt, the settings and the signature of this run; --model, "
    "--experts and --scope are then refused.",
)
@allow_missing_option
def generate(
    generator: str | None,
    samples: int,
    check: bool,
    as_json: bool,
    out: Path | None,
    model: str | None,
    experts: int | None,
    scope: str | None,
    run: Path | None,
    trust_limits: bool,
    allow_missing: tuple[str, ...],
    mesh: str | None,
    **options: Any,
) -> None:
    """Sample programs, or any text, from a model.

    With --run, the generator, the prompt and all settings are those of the run, and the samples of
    an iteration are the run's. --check judges as `sdjax check` does, for --model, --experts and
    --scope or for the run; the model that is merged into is by default MODEL.
    """
    if generator is None and run is None:
        raise UserError("generate requires MODEL, or --run DIR")
    for name, value in (("--model", model), ("--scope", scope)):
        if value is not None and not check:
            raise UserError(f"{name} requires --check; add it, or remove {name}")
    if trust_limits and not (check and run):
        raise UserError("--trust-limits requires --run DIR and --check")
    if as_json and out is not None:
        raise UserError("--out writes JSON lines by itself; remove --json")
    if run is None:
        model = model or generator
    elif experts is not None:
        raise UserError("--run has its own experts; remove --experts")
    from sdjax.merging.engine import default_slots
    from sdjax.search.sampling import SamplingOptions, generator_of_model, generator_of_run

    signature = None
    if check:
        signature = signature_from_options(
            model=model, experts=experts, scope=scope, run=run, trust_limits=trust_limits
        )
    settings = SamplingOptions(
        mesh=parse_mesh(mesh), allow_missing=allow_missing, trust_limits=trust_limits, **options
    )
    with _output(out) as file:
        if run is not None:
            loaded = generator_of_run(run, settings, count=samples, model=generator)
        else:
            assert generator is not None
            names = default_slots(experts or 3)
            loaded = generator_of_model(generator, settings, slots=names, count=samples)
        summary = _sample(loaded, signature, allow_missing, file, as_json=as_json)
    echo(summary, err=as_json)


def _sample(
    generator: PromptedGenerator,
    signature: MergeSignature | None,
    allow_missing: tuple[str, ...],
    file: IO[str] | None,
    *,
    as_json: bool,
) -> str:
    """Print or write the samples as they finish, and return a summary."""
    from sdjax.core.progress import progress_bar
    from sdjax.sandbox.sandbox import Sandbox
    from sdjax.search.sampling import sample_programs

    checked, statuses, stopped = signature is not None, Counter[str](), 0
    count = len(generator.prompts)

    def report(sample: GeneratedSample) -> None:
        nonlocal stopped
        stopped += sample.stopped
        statuses[NO_PROGRAM if sample.verdict is None else sample.verdict.verdict] += 1
        if as_json or file is not None:
            click.echo(json.dumps(_fields(sample, checked=checked)), file=file)
        else:
            echo(readable(sample, checked=checked))
        advance()

    def no_advance() -> None:
        pass

    sandbox_context = (
        nullcontext()
        if signature is None
        else Sandbox(signature, workers=1, allow_missing=allow_missing)
    )
    # Between samples on a terminal, a bar would be in the way.
    bar = nullcontext(no_advance) if file is None else progress_bar("generate", count)
    with sandbox_context as sandbox, bar as advance:
        sample_programs(generator, sandbox=sandbox, on_sample=report)
    return _summary(count, stopped, statuses, checked=checked)


def _summary(count: int, stopped: int, statuses: Counter[str], *, checked: bool) -> str:
    from sdjax.evaluation.statistics import percent
    from sdjax.sandbox.verdict import ADMITTED, is_admissible

    samples = "1 sample" if count == 1 else f"{count} samples"
    lines = [f"{samples}, {stopped} ended by a stop token"]
    if checked:
        admissible = sum(n for status, n in statuses.items() if is_admissible(status))
        for label, number in (("admissible", admissible), ("novel", statuses[ADMITTED])):
            lines.append(f"{number} {label} ({percent(number / count)}%)")
        rest = [
            f"{n} {status}" for status, n in statuses.most_common() if not is_admissible(status)
        ]
        lines.extend(rest)
    return ", ".join(lines)


def _fields(sample: GeneratedSample, *, checked: bool) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "number": sample.number,
        "text": sample.text,
        "tokens": len(sample.tokens),
        "stopped": sample.stopped,
        "program": sample.source,
    }
    if not checked:
        return fields
    if sample.verdict is None:
        return fields | {"verdict": NO_PROGRAM}
    return fields | verdict_fields(sample.verdict)


def readable(sample: GeneratedSample, *, checked: bool) -> str:
    """Return a sample for a terminal, without control characters."""
    from sdjax.core.visible import visible

    remarks = [] if sample.stopped else ["not ended by a stop token"]
    verdict = sample.verdict
    if checked and verdict is None:
        remarks.append(NO_PROGRAM)
    elif verdict is not None:
        reason = verdict.message or ", ".join(verdict.remarks)
        remarks.append(f"{verdict.verdict}{f': {reason}' if reason else ''}")
        if verdict.identity is not None:
            remarks.append(f"identity {verdict.identity[:12]}")
    title = "; ".join([f"sample {sample.number}", *remarks])
    return f"--- {visible(title)}\n{visible(sample.text)}\n"


@contextmanager
def _output(out: Path | None) -> Iterator[IO[str] | None]:
    """Yield the file of --out, which appears under its name when it is complete."""
    if out is None:
        with resume_hint("use --out FILE to keep the samples"):
            yield None
        return
    from sdjax.core.storage_errors import storage_errors
    from sdjax.io.atomic_write import commit, partial_path
    from sdjax.io.links import create_file

    if out.exists():
        raise UserError(f"{out}: already exists; remove it, or choose another --out")
    partial = partial_path(out)
    hint = f"the finished samples are in {partial}, which the same command overwrites"
    with resume_hint(hint), storage_errors(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(create_file(partial), "w", encoding="utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        commit(partial, out)
