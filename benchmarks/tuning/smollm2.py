"""Gradient step of a merge of SmolLM2-135M and three experts: seconds and memory.

The experts are the model plus random noise, which is as fast as fine-tuned ones. A step has 64 rows
of 128 tokens of GSM8K's training problems. Next to it, the same process decodes 100 SVAMP problems
with a merge, which is one evaluation of a search by CMA-ES.

    python -m benchmarks.tuning.smollm2 MODEL --train gsm8k_train.jsonl --svamp svamp.jsonl

MODEL is written by `benchmarks/real_model.py`. `--compile-only` prints the memory of the step and
ends.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import sdjax
from benchmarks.environment import describe_environment
from sdjax.decoding.config import fit_decoder_config
from sdjax.evaluation.prompts import build_prompts
from sdjax.evaluation.task import read_problems, read_training
from sdjax.evaluation.tasks.registry import find_task
from sdjax.models.params import param_specs
from sdjax.models.tree import flatten, unflatten
from sdjax.tuning.candidates import CandidateScorer
from sdjax.tuning.families import family_tunable
from sdjax.tuning.loss import MergeLoss, training_examples
from sdjax.tuning.model_set import ModelSet
from sdjax.tuning.search import SearchConfig

ROWS, LENGTH, NOISE = 64, 128, 0.02
NEW_TOKENS = 128


def perturbed(params: dict, paths: list[str], seed: int) -> dict:
    """Return an expert: the parameters plus noise, relative to each tensor's deviation."""
    rng = np.random.default_rng(seed)
    leaves = flatten(params)

    def noise(x: jax.Array) -> np.ndarray:
        exact = np.asarray(x, np.float32)
        draw = rng.standard_normal(x.shape, np.float32)
        return (exact + NOISE * exact.std() * draw).astype(x.dtype)

    return unflatten({path: jnp.asarray(noise(leaves[path])) for path in paths})


def peak_memory() -> float:
    """Return the peak of this process so far, in GB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--train", type=Path, required=True)
    parser.add_argument("--svamp", type=Path, required=True)
    parser.add_argument("--family", default="weights")
    parser.add_argument("--scope", default="mlp")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeat", type=int, default=5, help="steps after the first one")
    parser.add_argument("--compile-only", action="store_true")
    arguments = parser.parse_args()
    print(describe_environment(), flush=True)
    config, base = sdjax.load_model(arguments.model)
    tokenizer = sdjax.load_tokenizer(arguments.model)
    models = ModelSet(
        base=arguments.model,
        experts={f"expert_{i}": f"noise {i}" for i in (1, 2, 3)},
        paths=tuple(param_specs(config)),
        scope=arguments.scope,
    )
    tunable = family_tunable("task_arithmetic", arguments.family, models)
    paths, dtype = list(models.in_scope), jnp.dtype(arguments.dtype)
    base = unflatten(
        {path: x if path in paths else x.astype(dtype) for path, x in flatten(base).items()}
    )
    experts = [perturbed(base, paths, seed) for seed in (1, 2, 3)]
    merger = sdjax.Merger(base, experts, scope=tuple(paths))
    task = find_task("gsm8k", data=arguments.train.with_name("gsm8k_test.jsonl"), shots=0)
    examples = [
        example
        for example in training_examples(task, read_training(task), tokenizer, max_length=512)
        if len(example) <= LENGTH
    ]
    loss = MergeLoss(
        merger,
        tunable,
        base,
        config=config,
        compute_dtype=dtype,
        key=jax.random.key(0),
        examples=examples,
        search=SearchConfig(budget=1, steps=arguments.repeat + 1, batch=ROWS),
    )
    assert loss.tokens == ROWS * LENGTH
    start = time.perf_counter()
    memory = loss.model_gradient().memory_analysis()
    row = {
        "family": tunable.name,
        "scope": arguments.scope,
        "numbers": len(tunable.parameters),
        "compilation seconds": round(time.perf_counter() - start, 1),
        "arguments GB": round(memory.argument_size_in_bytes / 1e9, 3),
        "temporary GB": round(memory.temp_size_in_bytes / 1e9, 3),
        "results GB": round(memory.output_size_in_bytes / 1e9, 3),
    }
    print(json.dumps(row), flush=True)
    if arguments.compile_only:
        return
    seconds = []
    for step in range(arguments.repeat + 1):
        start, cpu = time.perf_counter(), time.process_time()
        value, gradient = loss(tunable.start, 0, step)
        seconds.append((time.perf_counter() - start, time.process_time() - cpu))
        assert np.isfinite(value)
        assert np.all(gradient != 0)
    wall, cpu = np.median(seconds[1:], axis=0)
    first = {"first step seconds": round(seconds[0][0], 1)}
    step_row = first | {"step seconds": round(wall, 1), "step CPU seconds": round(cpu, 1)}
    print(json.dumps(step_row | {"peak GB": round(peak_memory(), 2)}), flush=True)
    svamp = find_task("svamp", data=arguments.svamp)
    problems = build_prompts(svamp, read_problems(svamp, "development")[:100], tokenizer)
    sizes = fit_decoder_config(config, [problem.tokens for problem in problems], NEW_TOKENS)
    scorer = CandidateScorer(
        merger,
        tunable.bind,
        decoder=sdjax.Decoder(config, sizes, tokenizer=tokenizer, compute_dtype=dtype),
        tokenizer=tokenizer,
        task=svamp,
        metric="flexible",
        key=jax.random.key(0),
    )
    for title in ("first", "second"):  # the first one compiles
        start, cpu = time.perf_counter(), time.process_time()
        result = scorer(tunable.start, problems)
        decode_row = {
            "evaluation": title,
            "seconds": round(time.perf_counter() - start, 1),
            "CPU seconds": round(time.process_time() - cpu, 1),
            "tokens": result["tokens"],
            "peak GB": round(peak_memory(), 2),
        }
        print(json.dumps(decode_row), flush=True)


if __name__ == "__main__":
    main()
