"""Sampled and scored programs per minute: sdjax, and the loop of mergekit, transformers and TRL.

    python -m benchmarks.loop.compare WORK --peer VENV/bin/python

Both run the demo's search on the same models with the same numbers of samples, iterations, training
steps and problems, one after the other, each in a process of its own that is timed from its start
to its end, compilation included.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_environment, foreign_versions
from sdjax.evaluation.task import read_problems
from sdjax.io.model_paths import model_folder
from sdjax.search.config import RunConfig, prompt_template, read_config
from sdjax.search.plan import load_task
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT

PEER = Path(__file__).with_name("peer.py")
PACKAGES = ("mergekit", "transformers", "trl", "peft", "torch")
# The loop alone: programs are scored as they were written, on all problems. What comes after the
# last iteration is one test problem.
LOOP = (
    *("task.confirmation=0", "task.test=1", "transfer={}", "baselines={}", "controls=null"),
    *("tuning=null", "score=as_written", "race=null", "test.top_k=1", "test.ablations=0"),
    *("generation.memory=null", "generation.prompt=short"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("work", type=Path)
    parser.add_argument("--peer", type=Path, required=True, help="python of its environment")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--set", action="append", default=[], help="key of demo.yaml, KEY=VALUE")
    parser.add_argument("--repeat", type=int, default=1)
    parser.add_argument("--sides", nargs="+", default=["sdjax", "peer"])
    options = parser.parse_args()
    settings = [*LOOP, f"task.development={options.problems}", *options.set]
    config = read_config("demo", settings)
    options.work.mkdir(parents=True, exist_ok=True)
    theirs = foreign_versions(options.peer.absolute(), *PACKAGES)
    print(f"{describe_environment()}; {theirs}; {options.problems} problems")
    print("| loop | seconds | samples per minute | distinct scored programs per minute | best |")
    print("|---|---|---|---|---|")
    rates: dict[str, list[float]] = {}
    for _ in range(options.repeat):
        for side in options.sides:
            run = _run_sdjax if side == "sdjax" else _run_peer
            seconds, found = run(options, config, settings)
            scored = found["distinct scored"]
            rates.setdefault(side, []).append(60 * scored / seconds)
            print(
                f"| {side} | {seconds:.1f} | {60 * found['samples'] / seconds:.1f} "
                f"| {rates[side][-1]:.1f} | {100 * found['best']:.1f} |",
                flush=True,
            )
    if len(rates) == 2:
        ours, theirs_best = max(rates["sdjax"]), max(rates["peer"])
        print(f"\nsdjax scores {ours / theirs_best:.1f} times as many distinct programs per minute")


def _run_sdjax(
    options: argparse.Namespace, config: RunConfig, settings: Sequence[str]
) -> tuple[float, dict[str, Any]]:
    folder = options.work / "sdjax"
    shutil.rmtree(folder, ignore_errors=True)
    words = [word for setting in settings for word in ("--set", setting)]
    command = [sys.executable, "-m", "sdjax", "run", "demo", *words, "--out", str(folder)]
    seconds = _timed(command, options.work / "sdjax.log")[0]
    with Store.open(folder) as store:
        samples = store.judged()
        summaries = store.summaries(DEVELOPMENT)
        phases = {f"{name} {n}": round(t, 1) for (n, name), t in store.phases().items()}
    scores = [one.strict for one in summaries if one.entry.startswith("program:")]
    print(json.dumps({"phases": phases}), file=sys.stderr)
    return seconds, {"samples": len(samples), "distinct scored": len(scores), "best": max(scores)}


def _run_peer(
    options: argparse.Namespace, config: RunConfig, settings: Sequence[str]
) -> tuple[float, dict[str, Any]]:
    del settings
    request = options.work / "request.json"
    request.write_text(json.dumps(_request(config), indent=1))
    command = [str(options.peer.absolute()), str(PEER), str(request), str(options.work / "peer")]
    seconds, output = _timed(command, options.work / "peer.log")
    found = json.loads(output.splitlines()[-1])
    print(json.dumps(found), file=sys.stderr)
    return seconds, found


def _timed(command: Sequence[str], log: Path) -> tuple[float, str]:
    """Run a command without the network; return its seconds and its output."""
    offline = {"HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}
    start = time.perf_counter()
    with log.open("w") as errors:
        done = subprocess.run(
            command,
            env=os.environ | offline,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            check=True,
        )
    return time.perf_counter() - start, done.stdout


def _request(config: RunConfig) -> dict[str, Any]:
    """Return what the peer needs of a config."""
    task = load_task(config, trust_code=False)
    problems = read_problems(task, DEVELOPMENT)
    generation, selection, training = config.generation, config.selection, config.training
    descriptions = {slot: expert.description for slot, expert in config.experts.items()}
    prompt = prompt_template(config).render(slots=config.slots, descriptions=descriptions)
    return {
        "seed": str(model_folder(config.seed)),
        "experts": {slot: str(model_folder(one.model)) for slot, one in config.experts.items()},
        "iterations": config.iterations,
        "rng_seed": config.rng_seed,
        "problems": [{"prompt": task.prompt(one), "answer": one.answer} for one in problems],
        "answer_tokens": config.evaluation.max_new_tokens,
        "generation": {
            "prompt": prompt,
            "samples": generation.samples,
            "temperature": generation.temperature,
            "slope": generation.slope,
            "max_new_tokens": generation.decoding.max_new_tokens,
        },
        "selection": {
            "chosen_percent": selection.chosen_percent,
            "rejected_percent": selection.rejected_percent,
            "min_gap": selection.min_gap,
            "max_pairs": selection.max_pairs,
        },
        "training": {
            "rank": training.rank,
            "alpha": training.alpha,
            "max_steps": training.max_steps,
            "batch_size": training.batch_size,
            "learning_rate": training.learning_rate,
            "beta": training.beta,
            "nll_weight": training.nll_weight,
        },
    }


if __name__ == "__main__":
    main()
