"""Does the generator learn? Its first and last state, and a control that is never trained.

For each random seed: a run of the configuration, a control run on the same temperature schedule
whose generator is never trained, and as many samples from the first and from the last generator at
temperature 1. The mean score is over the samples that could be scored, duplicates with their
original's score; a refused sample has none. Two more columns count it: as 0, and as the seed's own
score (what a user who drops it is left with). The rows of a run are over all its iterations, the
first one (untrained in both) included. Writes a table of means over the seeds with 95 % intervals
of the differences, paired by seed.

    python benchmarks/learning/measure.py --out runs/learning

An interrupted measurement goes on where it stopped. Programs that another run of this measurement
has scored, on the same models and problems, are not scored again. `--only 0 2 4` beside
`--only 1 3` measures in two processes; the last to end prints the whole table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
from functools import partial
from importlib import metadata
from pathlib import Path

import numpy as np

from sdjax.evaluation.statistics import mean_interval
from sdjax.io.orbax import GeneratorCheckpoints
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.config import BaselinesConfig, RunConfig
from sdjax.search.config_reader import read_config
from sdjax.search.context import RunContext, build_context
from sdjax.search.database import FILE
from sdjax.search.loop import GENERATORS, generator, run
from sdjax.search.phases import development_scores, generate, judge, score_programs
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, SEARCH, program_candidate

TEMPERATURE = 1.0
MEASURES = (
    *("mean score", "refused as 0", "refused as seed"),
    *("admissible", "distinct", "not from training", "best"),
)
SEED_SCORE = 0.512  # the demo's seed on the development problems

# Measure to value, by the name of what is measured.
Row = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=int, nargs="+", default=list(range(5)), metavar="SEED")
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()
    config = read_config(options.config)
    for seed in options.only:
        path = options.out / f"row-{seed}.json"
        if not path.exists():
            row = measure(config, options.out, seed, options.samples)
            path.write_text(json.dumps(row, indent=1) + "\n")
        rows = [read_row(path) for path in sorted(options.out.glob("row-*.json"))]
        print(_table(rows, options.samples), flush=True)


def read_row(path: Path) -> Row:
    """A measured row, with the means over all samples that follow from it."""
    row: Row = json.loads(path.read_text())
    for measured in row.values():
        sum_of_scored = measured["mean score"] * measured["admissible"]
        measured["refused as 0"] = sum_of_scored
        measured["refused as seed"] = sum_of_scored + SEED_SCORE * (1 - measured["admissible"])
    return row


def measure(config: RunConfig, out: Path, seed: int, samples: int) -> Row:
    """All measures of one random seed: generators, and runs, by name."""
    settings = {
        "trained": _without_extras(config, seed, trained=True),
        "control": _without_extras(config, seed, trained=False),
    }
    row: Row = {}
    for name, setting in settings.items():
        folder = out / f"{name}-{seed}"
        run(setting, folder, say=partial(_say, folder))
    bench = build_context(settings["trained"])
    with Store.open(out / f"trained-{seed}", write=True) as store:
        for state, iteration in (("first", 1), ("last", config.iterations + 1)):
            _probe(bench, store, state, iteration, samples)
            row[f"{state} generator"] = _measures(bench, store, state)
    for name in settings:
        with Store.open(out / f"{name}-{seed}") as store:
            row[f"{name} run"] = _measures(bench, store, SEARCH)
    return row


def _without_extras(config: RunConfig, seed: int, *, trained: bool) -> RunConfig:
    """The configuration with this seed, less what has no part in learning."""
    return dataclasses.replace(
        config,
        random=seed,
        baselines=BaselinesConfig(),
        transfer={},
        test=dataclasses.replace(config.test, top_k=1),
        training=dataclasses.replace(config.training, enabled=trained),
    )


def _say(folder: Path, line: str) -> None:
    print(f"{folder.name}: {line}", flush=True)


def _probe(bench: RunContext, store: Store, state: str, iteration: int, samples: int) -> None:
    """Samples from the generator of an iteration, judged and scored."""
    with GeneratorCheckpoints(store.folder / GENERATORS) as checkpoints:
        adapter = generator(bench, store, checkpoints, iteration)
    generate(
        bench,
        store,
        adapter,
        iteration=iteration,
        count=samples,
        temperature=TEMPERATURE,
        purpose=state,
    )
    with Sandbox(bench.signature, workers=bench.config.sandbox.workers) as sandbox:
        judge(bench, store, sandbox, iteration=iteration, purpose=state)
    _adopt_scores(store, iteration, state)
    score_programs(bench, store, iteration=iteration, purpose=state)


def _adopt_scores(store: Store, iteration: int, purpose: str) -> None:
    """Takes over the development outcomes of programs that the other runs have scored."""
    wanted = {
        program_candidate(sample.identity or "")
        for sample in store.judged(iteration, purpose)
        if sample.novel
    } - {summary.candidate for summary in store.summaries(DEVELOPMENT)}
    for database in sorted(store.folder.parent.glob(f"*/{FILE}")):
        if database.parent == store.folder:
            continue
        with Store.open(database.parent) as other:
            complete = {
                summary.candidate for summary in other.summaries(DEVELOPMENT) if summary.complete
            }
            candidates, applications = other.candidates(), other.applications()
            for name in sorted(wanted & complete):
                store.save_candidate(candidates[name])
                store.save_application(applications[name])
                store.save_scores(name, DEVELOPMENT, other.outcomes(name, DEVELOPMENT))
            wanted -= complete


def _measures(bench: RunContext, store: Store, purpose: str) -> dict[str, float]:
    samples = store.judged(purpose=purpose)
    scores = development_scores(bench, store)
    programs = store.programs()
    admissible = [sample for sample in samples if sample.admissible]
    novel = [sample for sample in samples if sample.novel]
    found = [scores.get(program_candidate(sample.identity or "")) for sample in admissible]
    fresh = [programs[sample.identity or ""].in_training is False for sample in novel]
    scored = [score for score in found if score is not None]
    return {
        "mean score": float(np.mean(scored)),
        "admissible": len(admissible) / len(samples),
        "distinct": len(novel) / len(samples),
        "not from training": float(np.mean(fresh)),
        "best": max(scored),
    }


def _table(rows: list[Row], samples: int) -> str:
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in ("jax", "sdjax"))
    lines = [
        f"{len(rows)} seeds, {samples} samples a generator at temperature {TEMPERATURE}; means",
        f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, "
        f"{versions}",
        "",
        f"| | {' | '.join(MEASURES)} |",
        "|---|" + "---|" * len(MEASURES),
    ]
    for name in rows[0]:
        cells = [f"{np.mean([row[name][measure] for row in rows]):.3f}" for measure in MEASURES]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if len(rows) > 1:
        for better, worse in (
            ("last generator", "first generator"),
            ("trained run", "control run"),
        ):
            cells = []
            for measure in MEASURES:
                gains = [row[better][measure] - row[worse][measure] for row in rows]
                interval = mean_interval(gains)
                cells.append(f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]")
            lines.append(f"| {better} − {worse} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
