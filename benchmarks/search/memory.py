"""Memory of a search over many programs: of this process, and of the sandbox's processes.

    python -m benchmarks.search.memory --programs 1000

Random programs of the grammar are judged, merged on the zoo's models and scored on four problems,
as in an iteration of a run; every 50 scored programs a line says how much memory is in use (RSS),
and how many executables and verified programs are cached. Sampling and
training are left out, because their buffers do not depend on the number of programs.
"""

from __future__ import annotations

import dataclasses
import gc
import tempfile
import time
from pathlib import Path

import click

from sdjax.decoding.config import DecoderConfig
from sdjax.search.config import RunConfig, read_config
from sdjax.search.context import RunContext, build_context
from sdjax.search.control_programs import random_program
from sdjax.search.iteration_scores import score_programs
from sdjax.search.multihost import open_sandbox
from sdjax.search.phases import judge
from sdjax.search.scoring import save_settings
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, MAIN, Sample

PROBLEMS = 4
BATCH = 50  # samples per iteration, and scored programs per line


def memory_of(process: str) -> int:
    """Return the bytes that a process and its descendants have in memory, without itself twice."""
    status = Path(f"/proc/{process}/status").read_text()
    (line,) = [line for line in status.splitlines() if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def memory_of_children(process: str = "self") -> int:
    """Return the bytes that the descendants of a process have in memory; shared pages count."""
    total = 0
    for children in Path(f"/proc/{process}/task").glob("*/children"):
        for child in children.read_text().split():
            try:
                total += memory_of(child) + memory_of_children(child)
            except (FileNotFoundError, ValueError):  # it has ended
                continue
    return total


def small_config() -> RunConfig:
    """Return the demo's config with few problems and without a race."""
    config = read_config("demo")
    return dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, development=PROBLEMS, confirmation=0, test=PROBLEMS),
        evaluation=DecoderConfig(
            slots=PROBLEMS, prefill_batch=PROBLEMS, buckets=(48,), max_new_tokens=8
        ),
        score="as_written",
        race=None,
        tuning=None,
        controls=None,
    )


def add_samples(context: RunContext, store: Store, iteration: int) -> None:
    """Save the samples of an iteration, which are random programs."""
    prompt = store.save_prompt("grammar", "")
    for number in range(BATCH):
        text = random_program(context, iteration * BATCH + number)
        key = {"prompt": prompt, "text": text, "tokens": (), "stopped": True, "source": text}
        store.save(Sample(iteration=iteration, number=number, **key))


@click.command()
@click.option("--programs", default=1000, show_default=True, help="Scored programs.")
def main(programs: int) -> None:
    """Print the memory of a search over many programs."""
    context, start, scored, iteration = build_context(small_config()), time.monotonic(), 0, 0
    cache = context.mergers[MAIN].compile_cache
    click.echo("programs   s  MB  workers MB  executables  verified")
    with (
        tempfile.TemporaryDirectory() as folder,
        Store.create(
            Path(folder) / "run", config=context.config.to_json(), versions={}, layers=[]
        ) as store,
        open_sandbox(context) as sandbox,
    ):
        save_settings(context, store)
        while scored < programs:
            add_samples(context, store, iteration := iteration + 1)
            judge(context, store, sandbox, iteration=iteration)
            score_programs(context, store, sandbox, iteration=iteration)
            scored = sum(one.complete for one in store.summaries(DEVELOPMENT))
            gc.collect()
            click.echo(
                f"{scored:8} {time.monotonic() - start:6.0f} {memory_of('self') / 1e6:6.0f} "
                f"{memory_of_children() / 1e6:6.0f} {len(cache):6} {len(context.verified):6}"
            )


if __name__ == "__main__":
    main()
