"""Score random structures with tuned constants, and the same programs as they were written.

For each seed, random programs of different structures are drawn from the grammar. They are scored
twice on the development problems of the demo, as `score: tuned` and `score: as_written` do, and the
best of each answers the test problems, once. The same command resumes.
"""

import argparse
import dataclasses
import resource
from pathlib import Path
from typing import Literal

import numpy as np

from benchmarks.environment import describe_environment
from sdjax.evaluation.statistics import paired_by_key
from sdjax.programs.grammar import sample_candidate
from sdjax.sandbox.verdict import ADMITTED
from sdjax.search.budget import spent
from sdjax.search.config import RunConfig, read_config
from sdjax.search.context import RunContext, build_context
from sdjax.search.iteration_scores import score_programs
from sdjax.search.multihost import open_sandbox, open_store
from sdjax.search.phases import judge
from sdjax.search.ranking import complete_scores, ranked
from sdjax.search.scoring import save_settings, score_program
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, TEST, Entry, Sample, StoredVerdict

Mode = Literal["tuned", "as_written"]
MODES: tuple[Mode, ...] = ("tuned", "as_written")
WEIGHTS = "weights"
# One weight per expert, scored like any other structure.
WEIGHTED_SUM = """def merge_models(task_vectors):
    a, b, c = task_vectors.values()
    return 0.4 * a + 0.4 * b + 0.4 * c
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/structures"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--structures", type=int, default=16)
    parser.add_argument("--set", action="append", default=[], help="key of demo.yaml, KEY=VALUE")
    options = parser.parse_args()
    config = read_config("demo", ["score=tuned", "transfer={}", *options.set])
    context = build_context(config)
    runs: list[tuple[str, int, Mode]] = [(WEIGHTS, 0, "tuned")]
    runs += [("random", seed, mode) for seed in range(options.seeds) for mode in MODES]
    solved = {}
    print(f"{describe_environment()}; {len(context.problems[DEVELOPMENT])} development problems")
    print("| structures | seed | score | development | test | - weights | problems | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for name, seed, mode in runs:
        folder = options.out / f"{name}-{seed}-{mode}"
        before = cpu_seconds()
        count = 1 if name == WEIGHTS else options.structures
        best, development, problems = search(config, context, folder, seed, mode, count)
        seconds = cpu_seconds() - before
        solved[folder] = best
        gain = paired_by_key(best, solved[options.out / f"{WEIGHTS}-0-tuned"])
        print(
            f"| {name} | {seed} | {mode} | {100 * development:.1f} "
            f"| {100 * np.mean([*best.values()]):.1f} | {gain.in_percent(signed=True)} "
            f"| {problems:,} | {seconds:.0f} |",
            flush=True,
        )
    print("\n| seed | best tuned minus best as written |\n|---|---|")
    for seed in range(options.seeds):
        tuned, written = (solved[options.out / f"random-{seed}-{mode}"] for mode in MODES)
        print(f"| {seed} | {paired_by_key(tuned, written).in_percent(signed=True)} |")


def search(
    config: RunConfig, context: RunContext, folder: Path, seed: int, mode: Mode, count: int
) -> tuple[dict[str, bool], float, int]:
    """Score structures; return the best one's answers to the test, its score, and the cost."""
    context = dataclasses.replace(context, config=dataclasses.replace(config, score=mode))
    with open_store(context, folder, accept_versions=True) as store:
        save_settings(context, store)
        with open_sandbox(context) as sandbox:
            prompt = store.save_prompt("grammar", "")
            while len(structures(store)) < count:
                number = len(store.sample_numbers(1))
                source = WEIGHTED_SUM if count == 1 else random_source(seed, number)
                store.save(
                    Sample(
                        iteration=1,
                        number=number,
                        prompt=prompt,
                        text=source,
                        tokens=(),
                        stopped=True,
                        source=source,
                    )
                )
                judge(context, store, sandbox, iteration=1)
            score_programs(context, store, sandbox, iteration=1)
            scores = complete_scores(store, config.task.metric)
            (name, *_) = ranked(scores)
            (entry,) = store.select(Entry, name=name)
            assert entry.identity is not None
            score_program(context, store, sandbox, entry.identity, TEST)
        outcomes = store.outcomes(name, TEST)
        best = {one.problem_id: getattr(one, config.task.metric) for one in outcomes}
        return best, scores[name], spent(store).problems


def random_source(seed: int, number: int) -> str:
    """Return a random program of the whole grammar, without deliberate faults."""
    rng = np.random.default_rng([seed, number])
    while True:
        candidate = sample_candidate(rng, allow_held_out=True)
        if not candidate.fails:
            return candidate.text


def structures(store: Store) -> set[str | None]:
    """Return the structures of the admitted programs."""
    verdicts = store.select(StoredVerdict)
    return {one.structure for one in verdicts if one.verdict == ADMITTED}


def cpu_seconds() -> float:
    """Return the processor time of this process and of its children that have ended."""
    usage = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in usage)


if __name__ == "__main__":
    main()
