"""Measure whether the generator learns: the first and last generators, and controls without it.

For each random seed, this script runs the config with the controls `random` and `untrained`, which
have the run's budget (see docs/tuning.md). It then draws the same number of samples at temperature
1 from the first and the last generator. Every program answers all development problems as it was
written. Scores are means over the samples that could be scored; a duplicate has its original's
score. Two more columns count refused samples as 0 and as the seed's score. The rows of a run cover
all its iterations. The table has means over the seeds with 95% intervals of the differences, paired
by seed.

    python -m benchmarks.learning.measure --out runs/learning

An interrupted measurement resumes. Programs that were scored by another run of the measurement are
not scored again. Seeds can be split between processes (`--only 0 2 4` and `--only 1 3`); the last
process to finish prints the complete table.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np

from benchmarks.environment import describe_environment
from sdjax.core.logging import configure_logging
from sdjax.evaluation.statistics import mean_interval
from sdjax.io.orbax import GeneratorCheckpoints
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.attempts import DATABASE_FILE
from sdjax.search.comparison_config import BaselinesConfig, ControlsConfig
from sdjax.search.config import RunConfig, read_config
from sdjax.search.context import RunContext, build_context
from sdjax.search.iteration_scores import score_programs
from sdjax.search.loop import GENERATORS_FOLDER, load_generator, run_search
from sdjax.search.phases import generate, judge
from sdjax.search.ranking import complete_scores, purpose_samples
from sdjax.search.score_types import Application
from sdjax.search.store import Store
from sdjax.search.types import (
    DEVELOPMENT,
    MAIN,
    RANDOM,
    SEARCH,
    UNTRAINED,
    Entry,
    Program,
    program_entry,
)

TEMPERATURE = 1.0
MEASURES = (
    *("mean score", "refused as 0", "refused as seed"),
    *("admissible", "distinct", "not from training", "best"),
)
SEED = "seed"
RUNS = {SEARCH: "trained run", UNTRAINED: "untrained control", RANDOM: "random control"}

# Values by generator or run, then by measure; the score of the seed as `SEED`, "mean score".
Row = dict[str, dict[str, float]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", type=int, nargs="+", default=list(range(5)), metavar="SEED")
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()
    configure_logging()
    config = read_config(options.config)
    for seed in options.only:
        path = options.out / f"row-{seed}.json"
        if not path.exists():
            row = measure(config, options.out, seed, options.samples)
            path.write_text(json.dumps(row, indent=1) + "\n")
        rows = [read_row(path) for path in sorted(options.out.glob("row-*.json"))]
        print(_table(rows, options.samples), flush=True)


def read_row(path: Path) -> Row:
    """Read a measured row and add the means over all samples."""
    row: Row = json.loads(path.read_text())
    seed_score = row.pop(SEED)["mean score"]
    for measured in row.values():
        sum_of_scored = measured["mean score"] * measured["admissible"]
        measured["refused as 0"] = sum_of_scored
        measured["refused as seed"] = sum_of_scored + seed_score * (1 - measured["admissible"])
    return row


def measure(config: RunConfig, out: Path, seed: int, samples: int) -> Row:
    """Return all measures of one random seed."""
    folder = out / f"run-{seed}"
    print(f"{folder.name}:", flush=True)
    config = _without_extras(config, seed)
    run_search(config, folder)
    context = build_context(config)
    row: Row = {}
    with Store.open(folder, write=True) as store:
        for state, iteration in (("first", 1), ("last", config.iterations + 1)):
            _probe(context, store, state, iteration, samples)
            row[f"{state} generator"] = _measures(context, store, state)
        for purpose, name in RUNS.items():
            row[name] = _measures(context, store, purpose)
        scores = complete_scores(store, config.task.metric)
        row[SEED] = {"mean score": scores["seed"]}
    return row


def _without_extras(config: RunConfig, seed: int) -> RunConfig:
    """Return the config with this seed, scored as written, and without baselines and transfer."""
    return dataclasses.replace(
        config,
        rng_seed=seed,
        baselines=BaselinesConfig(),
        controls=ControlsConfig(tuned=()),
        transfer={},
        score="as_written",
        race=None,
        tuning=None,
        test=dataclasses.replace(config.test, top_k=1, ablations=0),
        training=dataclasses.replace(config.training, after_last=True),
    )


def _probe(context: RunContext, store: Store, state: str, iteration: int, samples: int) -> None:
    """Sample from the generator of an iteration; judge and score the samples."""
    with GeneratorCheckpoints(store.folder / GENERATORS_FOLDER) as checkpoints:
        adapter = load_generator(context, store, checkpoints, iteration)
    generate(
        context,
        store,
        adapter,
        iteration=iteration,
        count=samples,
        temperature=TEMPERATURE,
        purpose=state,
    )
    with Sandbox(context.signature, workers=context.config.sandbox.workers) as sandbox:
        judge(context, store, sandbox, iteration=iteration, purpose=state)
        _copy_scores(store, iteration, state)
        score_programs(context, store, sandbox, iteration=iteration, purpose=state)


def _copy_scores(store: Store, iteration: int, purpose: str) -> None:
    """Copy the development outcomes of programs that other runs have already scored."""
    missing = {
        program_entry(sample.identity or "")
        for sample in store.judged(iteration, purpose)
        if sample.novel
    } - {summary.entry for summary in store.summaries(DEVELOPMENT)}
    for database in sorted(store.folder.parent.glob(f"*/{DATABASE_FILE}")):
        if database.parent == store.folder:
            continue
        with Store.open(database.parent) as source:
            complete = {
                summary.entry for summary in source.summaries(DEVELOPMENT) if summary.complete
            }
            entries, applications = source.by_key(Entry), source.by_key(Application, setting=MAIN)
            for name in sorted(missing & complete):
                store.save(entries[name])
                store.save(applications[name])
                store.save_scores(name, DEVELOPMENT, source.outcomes(name, DEVELOPMENT))
            missing -= complete


def _measures(context: RunContext, store: Store, purpose: str) -> dict[str, float]:
    samples = purpose_samples(store, purpose)
    scores = complete_scores(store, context.config.task.metric)
    programs = store.by_key(Program)
    admissible = [sample for sample in samples if sample.admissible]
    novel = [sample for sample in samples if sample.novel]
    sample_scores = [scores.get(program_entry(sample.identity or "")) for sample in admissible]
    unseen = [programs[sample.identity or ""].in_training is False for sample in novel]
    scored = [score for score in sample_scores if score is not None]
    return {
        "mean score": float(np.mean(scored)),
        "admissible": len(admissible) / len(samples),
        "distinct": len({sample.identity for sample in novel}) / len(samples),
        "not from training": float(np.mean(unseen)),
        "best": max(scored),
    }


def _table(rows: list[Row], samples: int) -> str:
    lines = [
        f"{len(rows)} seeds, {samples} samples per generator at temperature {TEMPERATURE}; means",
        describe_environment(),
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
            ("trained run", "untrained control"),
            ("trained run", "random control"),
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
