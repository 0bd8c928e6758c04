"""Does the choice of program matter on the zoo? Random programs, methods and experts, scored.

Draws programs from the grammar that the seed was trained on, applies them to the demo's experts and
scores the merged models on the development problems, beside the seed, the experts, task arithmetic
at every coefficient of the fine grid (its best one is what one coefficient can do), and reader and
calculator in full with a third of the judge (what is known to be possible).

    python benchmarks/zoo/spread.py --programs 100
"""

from __future__ import annotations

import argparse
import os
import platform
from importlib import metadata

import numpy as np

from sdjax.evaluation.evaluate import evaluate
from sdjax.evaluation.statistics import paired_difference
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.methods.registry import algorithm
from sdjax.programs.grammar import sample_program
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted
from sdjax.search.config_reader import read_config
from sdjax.search.context import RunContext, build_context
from sdjax.search.types import DEVELOPMENT

COEFFICIENTS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
QUANTILES = (0.0, 0.05, 0.25, 0.5, 0.75, 0.95, 1.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="configs/demo.yaml")
    parser.add_argument("--programs", type=int, default=100)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    bench = build_context(read_config(options.config))
    print(
        f"{len(bench.problems[DEVELOPMENT])} development problems, {os.cpu_count()} cores, "
        f"{platform.machine()}, Python {platform.python_version()}, jax {metadata.version('jax')}"
    )
    seed = right(bench, bench.seed)
    references = {"seed": seed}
    for index, slot in enumerate(bench.config.slots):
        references[f"{slot} alone"] = right(bench, bench.with_expert(index))
    sweep = {
        weight: of(bench, algorithm("task_arithmetic", weight=weight)) for weight in COEFFICIENTS
    }
    best = max(sweep, key=lambda weight: sweep[weight].mean())
    references[f"task arithmetic, best coefficient ({best})"] = sweep[best]
    references["1.0, 1.0, 0.3"] = of(bench, Algorithm.from_function(possible, name="possible"))
    for name, found in references.items():
        gain = paired_difference(found, seed)
        print(
            f"{name}: {found.mean():.3f}, above the seed {gain.mean:+.3f} "
            f"[{gain.low:+.3f}, {gain.high:+.3f}]",
            flush=True,
        )
    scores = np.array([found.mean() for found in random_programs(bench, options)])
    told = ", ".join(f"{q:.0%} {np.quantile(scores, q):.3f}" for q in QUANTILES)
    print(f"{len(scores)} random programs: {told}; standard deviation {scores.std():.3f}")
    for name, found in references.items():
        print(f"above {name}: {np.mean(scores > found.mean()):.0%} of them")


def random_programs(bench: RunContext, options: argparse.Namespace):
    """The outcomes of admissible programs of the grammar, as many as asked for."""
    rng = np.random.default_rng(options.seed)
    done = 0
    while done < options.programs:
        text = sample_program(rng).text
        try:
            ir = trace_trusted(text, bench.signature)
            program = verify_ir(ir, bench.signature)
        except Refusal:
            continue  # the grammar writes some programs that fail
        done += 1
        yield of(bench, to_algorithm(program, name=f"program {done}"))


def possible(task_vectors):
    reader, calculator, judge = task_vectors.values()
    return reader + calculator + 0.3 * judge


def of(bench: RunContext, method: Algorithm) -> np.ndarray:
    return right(bench, bench.merge(method).params)


def right(bench: RunContext, params: dict) -> np.ndarray:
    """Whether each development problem is solved, by strict reading."""
    problems = bench.problems[DEVELOPMENT]
    outcomes = evaluate(bench.eval_decoder, bench.tokenizer, params, bench.task, problems)
    return np.array([outcome.strict for outcome in outcomes], float)


if __name__ == "__main__":
    main()
