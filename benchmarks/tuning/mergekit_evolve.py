"""Evaluated candidates per minute of mergekit-evolve 0.1.5 and of sdjax, with the same trials.

    python -m benchmarks.tuning.mergekit_evolve FOLDER --mergekit VENV/bin/python

Three experts of the zoo are merged by task arithmetic, one weight each. Both read the same
configuration and score a candidate by its greedy answers to the same 320 problems, on this machine,
one after the other. What comes before the second population, such as compilation and the start of
workers, is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
from pathlib import Path

import sdjax
from sdjax.core.logging import configure_logging
from sdjax.evaluation.task import read_problems
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.model_paths import model_folder
from sdjax.tuning.candidates import split_development

SIDE = Path(__file__).with_name("mergekit_side.py")
MAX_NEW_TOKENS = 10
POPULATION = 7  # of CMA-ES with three numbers, in both
TASK = "zoo_arithmetic"
# Grades as the task's strict metric does: a number, optionally after an equation.
TASK_YAML = f"""\
task: {TASK}
dataset_path: json
dataset_kwargs: {{data_files: {{test: PROBLEMS}}}}
output_type: generate_until
test_split: test
doc_to_text: "{{{{prompt}}}}"
doc_to_target: "{{{{answer}}}}"
generation_kwargs: {{until: [], max_gen_toks: {MAX_NEW_TOKENS}, do_sample: false}}
filter_list:
  - name: strict
    filter:
      - {{function: regex, regex_pattern: '^\\s*(?:\\d+[+-]\\d+=)?(-?\\d+)\\s*$'}}
      - {{function: take_first}}
metric_list:
  - {{metric: exact_match, aggregation: mean, higher_is_better: true}}
"""
GENOME = {
    "genome": {
        "merge_method": "task_arithmetic",
        "base_model": str(model_folder("zoo:seed")),
        "models": [str(model_folder(f"zoo:{name}")) for name in ("reader", "calculator", "judge")],
        "layer_granularity": 0,
        "allow_negative_weights": True,
    },
    "tasks": [{"name": TASK, "metric": "exact_match,strict"}],
    "num_fewshot": 0,
    "apply_chat_template": False,
    "fewshot_as_multiturn": False,
}


def write_inputs(folder: Path) -> Path:
    """Write the problems, the task of lm-eval and the configuration; return the latter's path."""
    task = find_task("arithmetic")
    problems, _ = split_development(read_problems(task, "development"))
    tasks = folder / "tasks"
    tasks.mkdir(parents=True, exist_ok=True)
    lines = [
        json.dumps({"prompt": task.prompt(problem), "answer": problem.answer})
        for problem in problems
    ]
    data = folder / "problems.jsonl"
    data.write_text("\n".join(lines) + "\n")
    (tasks / f"{TASK}.yaml").write_text(TASK_YAML.replace("PROBLEMS", str(data.resolve())))
    genome = folder / "genome.yaml"
    genome.write_text(json.dumps(GENOME, indent=1))  # which is YAML
    return genome


def run_mergekit(
    python: Path, genome: Path, trials: int, batch: int, *extra: str
) -> list[tuple[float, list[float]]]:
    """Return the seconds and the scores of each population of mergekit-evolve."""
    folder = genome.parent.resolve()
    storage = folder / "storage"
    shutil.rmtree(storage, ignore_errors=True)
    offline = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    caches = {"HF_HOME": str(folder / "hugging-face")}
    command = [python, SIDE, genome, folder / "tasks", storage]
    options = ["--trials", str(trials), "--batch-size", str(batch), *extra]
    done = subprocess.run(
        [*map(str, command), *options],
        env={**os.environ, **offline, **caches},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows = json.loads(done.stdout.splitlines()[-1])
    return [(row["seconds"], row["scores"]) for row in rows]


def run_sdjax(genome: Path, trials: int) -> list[tuple[float, list[float]]]:
    """Return the seconds and the scores of each population of sdjax's CMA-ES."""
    result = sdjax.tune(
        str(genome),
        "arithmetic",
        budget=trials,
        optimizer="cmaes",
        max_new_tokens=MAX_NEW_TOKENS,
    )
    events = [event for event in result.trace if event["event"] == "evaluation"]
    groups = [events[n : n + POPULATION] for n in range(0, len(events), POPULATION)]
    return [(sum(e["seconds"] for e in one), [e["score"] for e in one]) for one in groups]


def row(name: str, populations: list[tuple[float, list[float]]]) -> float:
    """Print what a search did; return its candidates per minute after the first population."""
    later = populations[1:]
    count, seconds = sum(len(scores) for _, scores in later), sum(one for one, _ in later)
    rate = 60 * count / seconds
    found = {
        "name": name,
        "first population, s": round(populations[0][0], 1),
        "candidates after it": count,
        "seconds": round(seconds, 2),
        "candidates per minute": round(rate, 1),
        "best score": round(max(max(scores) for _, scores in populations), 4),
        "first scores": [round(score, 4) for score in populations[0][1]],
    }
    print(json.dumps(found), flush=True)
    return rate


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--mergekit", type=Path, required=True, help="its python")
    parser.add_argument("--trials", type=int, default=21)
    parser.add_argument("--batch-size", type=int, action="append", help="of lm-eval")
    arguments = parser.parse_args()
    configure_logging()
    genome = write_inputs(arguments.folder)
    # An absolute path that is not resolved: a virtual environment's python is a link.
    python, rates = arguments.mergekit.absolute(), []
    for batch in arguments.batch_size or (64,):
        for name, extra in (("pool", ()), ("pool, in memory", ("--in-memory",))):
            populations = run_mergekit(python, genome, arguments.trials, batch, *extra)
            rates.append(row(f"mergekit-evolve, {name}, batch {batch}", populations))
    ours = row("sdjax", run_sdjax(genome, arguments.trials))
    print(f"sdjax evaluates {ours / max(rates):.1f} times as many candidates per minute")


if __name__ == "__main__":
    main()
