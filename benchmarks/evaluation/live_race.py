"""Run searches of the same programs with a race and without, and compare what is kept.

    python -m benchmarks.evaluation.live_race FOLDER [--seeds 10]

Each seed is a run of the demo whose generator is not trained, so that both runs have the same
programs. Printed per seed: the share of the answers that the race needed, whether it kept all five
best programs, and whether an answer differs. An interrupted measurement resumes in FOLDER.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.environment import describe_environment
from sdjax.core.logging import configure_logging
from sdjax.evaluation.statistics import accuracy_interval
from sdjax.search.config import read_config
from sdjax.search.loop import run_search
from sdjax.search.ranking import ranked_programs
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT

# Only the scores of programs as they were written are compared, and one test problem is the least.
SETTINGS = (
    *("training.enabled=false", "score=as_written", "tuning=null", "controls=null"),
    *("baselines={}", "transfer={}", "task.development=640", "task.confirmation=0", "task.test=1"),
)
WINNERS = 5


def finished_run(folder: Path, seed: int, *settings: str) -> Path:
    """Start, resume or return a run of the demo."""
    config = read_config("demo", [*SETTINGS, f"rng_seed={seed}", *settings])
    run_search(config, folder)
    return folder


def answers(run: Path) -> tuple[dict[str, dict[str, bool]], list[str]]:
    """Return the answers of each program by problem, and the best programs."""
    with Store.open(run) as store:
        names = [one.entry for one in store.summaries(DEVELOPMENT) if "program:" in one.entry]
        solved = {
            name: {one.problem_id: one.strict for one in store.outcomes(name, DEVELOPMENT)}
            for name in names
        }
        return solved, [one.name for one in ranked_programs(store, "strict")][:WINNERS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seeds", type=int, default=10)
    arguments = parser.parse_args()
    configure_logging()
    print(describe_environment(), flush=True)
    kept, shares = [], []
    for seed in range(arguments.seeds):
        complete, best = answers(
            finished_run(arguments.folder / f"complete-{seed}", seed, "race=null")
        )
        raced, best_raced = answers(finished_run(arguments.folder / f"race-{seed}", seed))
        problems = max(map(len, complete.values()))
        missing = complete.keys() ^ raced.keys()
        different = sum(
            solved != complete[name][problem]
            for name in complete.keys() & raced.keys()
            for problem, solved in raced[name].items()
        )
        share = sum(map(len, raced.values())) / sum(map(len, complete.values()))
        shares.append(share)
        kept.append(best == best_raced)
        row = {
            "seed": seed,
            "programs": len(complete),
            "answers": sum(map(len, complete.values())),
            "share": round(share, 3),
            "kept": kept[-1],
            "complete in the race": sum(len(one) == problems for one in raced.values()),
            "programs in one run only": len(missing),
            "different answers": different,
        }
        print(json.dumps(row), flush=True)
    print(
        f"mean share {sum(shares) / len(shares):.3f}; best {WINNERS} kept, in the same order, in "
        f"{sum(kept)} of {len(kept)} runs ({accuracy_interval(kept).in_percent()} %)"
    )


if __name__ == "__main__":
    main()
