"""Compare decoding with transformers: equality of tokens, throughput, and evaluation time.

    PYTHONPATH=. python benchmarks/real_model.py --out /tmp/smollm2 (in the venv described there)
    python -m benchmarks.decoding.compare greedy fixed evaluation --model /tmp/smollm2 \
        --data DATA --transformers-python /tmp/smol/bin/python

The two sides run alternately in separate processes, on two threads in float32. DATA is a folder
with gsm8k_test.jsonl and svamp.jsonl. `--under` is a wrapper command for each process.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from pathlib import Path

from benchmarks.environment import describe_environment, foreign_versions

HERE = Path(__file__).parent
NEAR_TIE = 1e-3
BATCHES = (16, 32, 64)
PARTS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("jobs", nargs="+", choices=("greedy", "fixed", "evaluation"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument(
        "--transformers-python", required=True, help="Python interpreter of a venv with torch"
    )
    parser.add_argument("--under", default="", help="wrapper command for each process")
    options = parser.parse_args()
    theirs = foreign_versions(options.transformers_python, "torch", "transformers")
    print(f"{describe_environment()}; {theirs}", flush=True)

    def run(python: str, side: str, job: str, *arguments: object) -> dict:
        command = [*shlex.split(options.under), python, str(HERE / f"{side}.py"), job]
        command += ["--model", options.model, "--data", options.data, *map(str, arguments)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(HERE.parent.parent),
            "HF_HUB_OFFLINE": "1",
        }
        process = subprocess.run(
            command, env=environment, stdout=subprocess.PIPE, text=True, check=True
        )
        return json.loads(process.stdout.splitlines()[-1])

    def run_sdjax(job: str) -> dict:
        return run(sys.executable, "sdjax_side", job)

    def run_transformers(job: str, *arguments: object) -> dict:
        return run(options.transformers_python, "transformers_side", job, *arguments)

    reports = {"greedy": greedy, "fixed": fixed, "evaluation": evaluation}
    for job in options.jobs:
        reports[job](run_sdjax, run_transformers)


def greedy(run_sdjax, run_transformers) -> None:
    result, expected = run_sdjax("greedy"), run_transformers("greedy")
    differing, unexplained = [], 0
    for index, (a, b) in enumerate(zip(result.pop("tokens"), expected["tokens"], strict=True)):
        b = b[: b.index(expected["stop"])] if expected["stop"] in b else b
        if a == b:
            continue
        at = next((n for n, pair in enumerate(zip(a, b, strict=False)) if pair[0] != pair[1]), None)
        at = min(len(a), len(b)) if at is None else at
        gap = expected["gaps"][index][at]
        differing.append(f"{index} at token {at}, gap {gap:.1e}")
        unexplained += gap >= NEAR_TIE
    print(f"greedy, 64 GSM8K prompts, 128 tokens: {len(differing)} differ {differing}")
    print(f"  {unexplained} of them not at a near-tie; {result}", flush=True)


def fixed(run_sdjax, run_transformers) -> None:
    print("batch 32, 140-token prompts, 64 new tokens: tokens per second, median [min, max]")
    medians = {}
    for name, rows in (
        ("sdjax", run_sdjax("fixed")["rows"]),
        ("transformers", run_transformers("fixed")["rows"]),
    ):
        for what in ("prefill", "decode"):
            values = sorted(row[what] for row in rows)
            medians[name, what] = statistics.median(values)
            summary = f"{medians[name, what]:7.1f} [{values[0]:.1f}, {values[-1]:.1f}]"
            print(f"  {name:12s} {what:8s} {summary}", flush=True)
    for what in ("prefill", "decode"):
        ratio = medians["sdjax", what] / medians["transformers", what]
        print(f"  {what}: {ratio:.2f} times", flush=True)


def evaluation(run_sdjax, run_transformers) -> None:
    result = run_sdjax("evaluation")
    print(f"256 SVAMP problems, chat, at most 128 tokens; sdjax: {json.dumps(result)}", flush=True)
    best = float("inf")
    for batch in BATCHES:
        parts = [
            run_transformers("evaluation", "--batch", batch, "--part", number, PARTS)
            for number in range(PARTS)
        ]
        # Startup counts once: the run is split into parts only to limit the time per process.
        seconds = min(part["start"] for part in parts) + sum(part["generate"] for part in parts)
        produced, steps = (sum(part[name] for part in parts) for name in ("produced", "steps"))
        occupancy = f"mean output {produced / 256:.1f}, occupancy {produced / steps:.2f}"
        print(f"  transformers, batch {batch}: {seconds:.1f} s, {occupancy}", flush=True)
        best = min(best, seconds)
    print(f"  {best / result['seconds']:.2f} times", flush=True)


if __name__ == "__main__":
    main()
