"""Measure how much the choice of program matters on the zoo.

The script samples programs from the grammar that the seed was trained on, applies them to the
demo's experts and scores the merged models on the development problems. For comparison, it also
scores the seed, the experts, task arithmetic with several coefficients, and hand-picked weights
that work well: 1.0 for the first two experts and 0.3 for the third.

    python -m benchmarks.zoo.spread --programs 100
"""

from __future__ import annotations

import argparse

import numpy as np

from benchmarks.environment import describe_environment
from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.statistics import paired_difference
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.methods.registry import algorithm
from sdjax.programs.grammar import sample_candidate
from sdjax.sandbox.algorithm import to_algorithm
from sdjax.sandbox.refusal import Refusal
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.sandbox.worker.trace import trace_trusted
from sdjax.search.config import read_config
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
    context = build_context(read_config(options.config))
    print(f"{describe_environment()}; {len(context.problems[DEVELOPMENT])} development problems")
    seed = correct(context, context.seed)
    references = {"seed": seed}
    for index, slot in enumerate(context.config.slots):
        references[f"{slot} alone"] = correct(context, context.with_expert(index))
    sweep = {
        weight: merged_correct(context, algorithm("task_arithmetic", weight=weight))
        for weight in COEFFICIENTS
    }
    best = max(sweep, key=lambda weight: sweep[weight].mean())
    references[f"task arithmetic, best coefficient ({best})"] = sweep[best]
    references["1.0, 1.0, 0.3"] = merged_correct(
        context, Algorithm.from_function(possible, name="possible")
    )
    for name, outcomes in references.items():
        gain = paired_difference(outcomes, seed)
        print(
            f"{name}: {outcomes.mean():.3f}, minus seed {gain.mean:+.3f} "
            f"[{gain.low:+.3f}, {gain.high:+.3f}]",
            flush=True,
        )
    scores = np.array([outcomes.mean() for outcomes in random_programs(context, options)])
    quantiles = ", ".join(f"{q:.0%} {np.quantile(scores, q):.3f}" for q in QUANTILES)
    print(f"{len(scores)} random programs: {quantiles}; standard deviation {scores.std():.3f}")
    for name, outcomes in references.items():
        print(f"above {name}: {np.mean(scores > outcomes.mean()):.0%} of them")


def random_programs(context: RunContext, options: argparse.Namespace):
    """Yield the outcomes of random admissible programs."""
    rng = np.random.default_rng(options.seed)
    done = 0
    while done < options.programs:
        text = sample_candidate(rng).text
        try:
            ir = trace_trusted(text, context.signature)
            program = verify_ir(ir, context.signature)
        except Refusal:
            continue  # some programs of the grammar are broken on purpose
        done += 1
        yield merged_correct(context, to_algorithm(program, name=f"program {done}"))


def possible(task_vectors):
    reader, calculator, judge = task_vectors.values()
    return reader + calculator + 0.3 * judge


def merged_correct(context: RunContext, method: Algorithm) -> np.ndarray:
    return correct(context, context.merge(method).params)


def correct(context: RunContext, params: dict) -> np.ndarray:
    """Return whether each development problem is solved, by the strict filter."""
    problems = context.problems[DEVELOPMENT]
    outcomes = evaluate_problems(
        context.eval_decoder, context.tokenizer, params, context.task, problems
    )
    return np.array([outcome.strict for outcome in outcomes], float)


if __name__ == "__main__":
    main()
