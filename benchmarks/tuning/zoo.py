"""Weights of the zoo's experts tuned by gradient and by CMA-ES: test score, cost and time.

Cost is counted in tokens of forward passes: a gradient step is three passes over its batch, an
evaluation one pass over the tokens that it reads and generates. Each search sees half of the 640
development problems; the tuned merges then answer the 1,200 test problems, once.

    python -m benchmarks.tuning.zoo FOLDER [--family weights] [--seed 0]

An interrupted measurement resumes in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import sdjax
from benchmarks.environment import describe_environment
from sdjax.core.logging import configure_logging
from sdjax.evaluation.statistics import paired_by_key
from sdjax.tuning.results import Tuning

EXPERTS = ("zoo:reader", "zoo:calculator", "zoo:judge")
# 30 steps of 8 rows of 128 tokens; the development problems are decoded four times.
GRADIENT = {"optimizer": "gradient", "budget": 4, "steps": 30, "batch": 8}
CMAES = {"optimizer": "cmaes", "budget": 192}
ROW = 128


def tokens(result: Tuning) -> int:
    """Return the cost of a search."""
    steps = [event for event in result.trace if event["event"] == "step"]
    decoded = [event["tokens"] for event in result.trace if event["event"] == "evaluation"]
    return 3 * len(steps) * GRADIENT["batch"] * ROW + sum(decoded)


def search_seconds(result: Tuning) -> float:
    """Return the time of a search without that of its first step and evaluation, which compile."""
    seconds = {"step": [], "evaluation": []}
    for event in result.trace:
        if event["event"] in seconds:
            seconds[event["event"]].append(event["seconds"])
    return sum(sum(found[1:]) for found in seconds.values())


def measure(folder: Path, family: str, name: str, settings: dict, seed: int) -> dict[str, bool]:
    """Tune, write the merged model, score it on the test problems and print a row."""
    out, merged = folder / f"{family}-{name}-{seed}", folder / f"{family}-{name}-{seed}-model"
    models = {"base": "zoo:seed", "experts": EXPERTS, "scope": "mlp"}
    start = time.perf_counter()
    result = sdjax.tune(
        family,
        **models,
        **settings,
        seed=seed,
        out=out,
        merged=None if merged.exists() else merged,
    )
    wall = time.perf_counter() - start
    scores = sdjax.evaluate(str(merged), "arithmetic", split="test", out=out / "test")
    row = {
        "family": family,
        "optimizer": name,
        "seed": seed,
        "numbers": len(result.values),
        "development": round(100 * result.development, 1),
        "confirmed gain": result.gain.in_percent(signed=True),
        "test": scores.strict.in_percent(),
        "tokens": tokens(result),
        "seconds": round(search_seconds(result)),
        "seconds with compilation": round(result.seconds),
        "process": round(wall),
    }
    print(json.dumps(row), flush=True)
    return {problem.id: problem.strict for problem in scores.problems}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--family", action="append")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    configure_logging()
    print(describe_environment(), flush=True)
    for family in arguments.family or ("weights", "layers", "kinds"):
        by_gradient = measure(arguments.folder, family, "gradient", GRADIENT, arguments.seed)
        by_evolution = measure(arguments.folder, family, "cmaes", CMAES, arguments.seed)
        difference = paired_by_key(by_gradient, by_evolution)
        print(f"{family}: gradient minus CMA-ES {difference.in_percent(signed=True)}", flush=True)


if __name__ == "__main__":
    main()
