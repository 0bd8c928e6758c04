"""Does the generator learn? Its first and last state, and a control that is never trained.

For each random seed: a run of the configuration, a control run on the same temperature schedule
whose generator is never trained, and as many samples from the first and from the last generator at
temperature 1. The mean score is over the samples that could be scored, duplicates with their
original's score; a refused sample has no score and is counted by the admissible share alone, so
the two columns must be read together. The rows of a run are over all its iterations, the first one
(untrained in both) included. Writes a table of means over the seeds with 95 % intervals of the
differences, paired by seed.

    python benchmarks/learning/measure.py --out runs/learning

An interrupted measurement goes on where it stopped. Programs that an earlier run of this
measurement has scored, on the same models and problems, are not scored again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from functools import partial
from pathlib import Path

import numpy as np

from sdjax.evaluation.statistics import mean_interval
from sdjax.io.generator_checkpoint import GeneratorCheckpoints
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.config import BaselinesConfig, RunConfig
from sdjax.search.loop import GENERATORS, generator, run
from sdjax.search.phases import development_scores, generate, judge, score_programs
from sdjax.search.reading import read_config
from sdjax.search.records import DEVELOPMENT, SEARCH, program_candidate
from sdjax.search.store import Store
from sdjax.search.workbench import Workbench, prepare

TEMPERATURE = 1.0
MEASURES = ("mean score", "admissible", "distinct", "not from training")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=256)
    options = parser.parse_args()
    config = read_config(options.config)
    folders: list[Path] = []
    rows: list[dict[str, dict[str, float]]] = []
    for seed in range(options.seeds):
        row: dict[str, dict[str, float]] = {}
        trained = _without_extras(config, seed, trained=True)
        control = _without_extras(config, seed, trained=False)
        for name, settings in (("trained", trained), ("control", control)):
            folder = options.out / f"{name}-{seed}"
            run(settings, folder, say=partial(_say, folder))
            folders.append(folder)
        folder = options.out / f"trained-{seed}"
        bench = prepare(trained)
        with Store.open(folder, write=True) as store:
            for state, iteration in (("first", 1), ("last", trained.iterations + 1)):
                _probe(bench, store, folder, state, iteration, options.samples, folders)
                row[f"{state} generator"] = _measures(bench, store, state)
            row["trained run"] = _measures(bench, store, SEARCH)
            row["trained run"]["best"] = _best(bench, store)
        with Store.open(options.out / f"control-{seed}") as store:
            row["control run"] = _measures(bench, store, SEARCH)
            row["control run"]["best"] = _best(bench, store)
        rows.append(row)
        (options.out / "rows.json").write_text(json.dumps(rows, indent=1) + "\n")
        print(_table(rows, options.samples), flush=True)


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


def _probe(
    bench: Workbench,
    store: Store,
    folder: Path,
    state: str,
    iteration: int,
    samples: int,
    earlier: list[Path],
) -> None:
    with GeneratorCheckpoints(folder / GENERATORS) as checkpoints:
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
    with Sandbox(bench.contract, workers=bench.config.sandbox.workers) as sandbox:
        judge(bench, store, sandbox, iteration=iteration, purpose=state)
    _adopt_scores(store, earlier, iteration, state)
    score_programs(bench, store, iteration=iteration, purpose=state)


def _adopt_scores(store: Store, earlier: list[Path], iteration: int, purpose: str) -> None:
    """Takes over the development outcomes of programs that earlier runs have scored."""
    wanted = {
        program_candidate(sample.identity or "")
        for sample in store.judged(iteration, purpose)
        if sample.novel
    } - {summary.candidate for summary in store.summaries(DEVELOPMENT)}
    for folder in earlier:
        if folder == store.folder:
            continue
        with Store.open(folder) as other:
            complete = {
                summary.candidate for summary in other.summaries(DEVELOPMENT) if summary.complete
            }
            candidates, applications = other.candidates(), other.applications()
            for name in sorted(wanted & complete):
                store.save_candidate(candidates[name])
                store.save_application(applications[name])
                store.save_scores(name, DEVELOPMENT, other.outcomes(name, DEVELOPMENT))
            wanted -= complete


def _measures(bench: Workbench, store: Store, purpose: str) -> dict[str, float]:
    samples = store.judged(purpose=purpose)
    scores = development_scores(bench, store)
    programs = store.programs()
    admissible = [sample for sample in samples if sample.admissible]
    novel = [sample for sample in samples if sample.novel]
    found = [scores.get(program_candidate(sample.identity or "")) for sample in admissible]
    fresh = [programs[sample.identity or ""].in_training is False for sample in novel]
    return {
        "mean score": float(np.mean([score for score in found if score is not None])),
        "admissible": len(admissible) / len(samples),
        "distinct": len(novel) / len(samples),
        "not from training": float(np.mean(fresh)),
    }


def _best(bench: Workbench, store: Store) -> float:
    return max(
        score
        for name, score in development_scores(bench, store).items()
        if name.startswith("program:")
    )


def _table(rows: list[dict[str, dict[str, float]]], samples: int) -> str:
    lines = [
        f"{len(rows)} seeds, {samples} samples a generator at temperature {TEMPERATURE}; means",
        "",
        "| | mean score | admissible | distinct | not from training | best |",
        "|---|---|---|---|---|---|",
    ]
    for name in rows[0]:
        cells = [
            f"{np.mean([row[name][measure] for row in rows]):.3f}"
            if measure in rows[0][name]
            else ""
            for measure in (*MEASURES, "best")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    if len(rows) > 1:
        for better, worse in (
            ("last generator", "first generator"),
            ("trained run", "control run"),
        ):
            cells = []
            for measure in (*MEASURES, "best"):
                if measure not in rows[0][better]:
                    cells.append("")
                    continue
                gains = [row[better][measure] - row[worse][measure] for row in rows]
                interval = mean_interval(gains)
                cells.append(f"{interval.mean:+.3f} [{interval.low:+.3f}, {interval.high:+.3f}]")
            lines.append(f"| {better} − {worse} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
