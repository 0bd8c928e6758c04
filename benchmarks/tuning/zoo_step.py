"""Seconds of gradient steps on the zoo: the first one, which compiles, and the later ones.

Three experts are merged into the seed's MLPs: first by a weight per expert, then by a program with
five constants, whose merge is another structure. Both share the model's gradient, as in a run.

    python -m benchmarks.tuning.zoo_step [--repeat 20]
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from typing import Any

import jax
import numpy as np

import sdjax
from benchmarks.environment import describe_environment
from benchmarks.tuning.tpu import discovered
from sdjax.evaluation.task import read_training
from sdjax.evaluation.tasks.registry import find_task
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.models.params import param_specs
from sdjax.tuning.families import family_tunable
from sdjax.tuning.loss import MergeLoss, training_examples
from sdjax.tuning.model_set import ModelSet
from sdjax.tuning.search import SearchConfig
from sdjax.tuning.types import Parameter, Tunable

EXPERTS = ("zoo:reader", "zoo:calculator", "zoo:judge")


def program_tunable(weights: Tunable) -> Tunable:
    """Return the program whose five constants are tuned."""
    made = Algorithm.from_function(discovered)
    starts = dict(made.hyperparameters)

    def bind(values: Any) -> Algorithm:
        return made.bind(**dict(zip(starts, values, strict=True)))

    parameters = tuple(
        Parameter(name=name, start=start, low=start - 1, high=start + 1)
        for name, start in starts.items()
    )
    return replace(weights, name="program", parameters=parameters, bind=bind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeat", type=int, default=20)
    options = parser.parse_args()
    print(describe_environment(), flush=True)
    config, base = sdjax.load_model("zoo:seed")
    tokenizer = sdjax.load_tokenizer("zoo:seed")
    task = find_task("arithmetic")
    examples = training_examples(
        task, read_training(task), tokenizer, max_length=config.max_seq_len
    )
    experts = [sdjax.load_model(name)[1] for name in EXPERTS]
    paths = tuple(param_specs(config))
    models = ModelSet(
        base="zoo:seed",
        experts={f"expert_{i}": name for i, name in enumerate(EXPERTS, 1)},
        paths=paths,
        scope="mlp",
    )
    merger = sdjax.Merger(base, experts, scope="mlp", compile_cache=CompileCache(quick=True))
    weights = family_tunable("task_arithmetic", "weights", models)
    shared = CompileCache()
    for tunable in (weights, program_tunable(weights)):
        loss = MergeLoss(
            merger,
            tunable,
            base,
            config=config,
            compute_dtype=np.float32,
            key=jax.random.key(0),
            examples=examples,
            search=SearchConfig(budget=1, steps=options.repeat + 1),
            compile_cache=shared,
        )
        seconds = []
        for step in range(options.repeat + 1):
            start, cpu = time.perf_counter(), time.process_time()
            value, gradient = loss(tunable.start, 0, step)
            seconds.append((time.perf_counter() - start, time.process_time() - cpu))
            assert np.isfinite(value)
            assert np.all(gradient != 0)
        first, later = seconds[0], np.median(seconds[1:], axis=0)
        row = {
            "tuned": tunable.name,
            "numbers": len(tunable.parameters),
            "first step": [round(x, 2) for x in first],
            "later steps": [round(float(x), 3) for x in later],
            "compiled": [shared.compiled, merger.compile_cache.compiled],
        }
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
