"""Evaluated candidates per minute of mergekit-evolve 0.1.5 and of sdjax, with the same trials.

    python -m benchmarks.tuning.mergekit_evolve FOLDER --mergekit VENV/bin/python

Three experts of the zoo are merged by task arithmetic, one weight each. Both read the same
configuration and score a candidate by its greedy answers to the same 320 problems, on this machine,
one after the other. What comes before the second population, such as compilation and the start of
workers, is not counted. Processor time is measured as well, since other work on the machine
changes it less than the wall time.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import sdjax
from benchmarks.environment import describe_environment, foreign_versions
from sdjax.core.logging import configure_logging
from sdjax.evaluation.task import read_problems
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.model_paths import model_folder
from sdjax.tuning.candidates import CandidateScorer, split_development

SIDE = Path(__file__).with_name("mergekit_side.py")
MAX_NEW_TOKENS = 10
POPULATION = 7  # of CMA-ES with three numbers, in both
PACKAGES = ("mergekit", "lm_eval", "transformers", "torch", "ray")
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


@dataclass(frozen=True, kw_only=True)
class Population:
    """Candidates that were evaluated one after the other or at the same time.

    Attributes:
        seconds: how long that took.
        processor: processor time of all processes that took part, in seconds.
        scores: the candidates' scores.
    """

    seconds: float
    processor: float
    scores: list[float]


def run_mergekit(python: Path, genome: Path, trials: int, batch: int) -> list[Population]:
    """Return the populations of mergekit-evolve."""
    genome = genome.resolve()
    folder = genome.parent
    storage = folder / "storage"
    shutil.rmtree(storage, ignore_errors=True)
    offline = {"HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0"}
    caches = {"HF_HOME": str(folder / "hugging-face")}
    command = [python, SIDE, genome, folder / "tasks", storage]
    options = ["--trials", str(trials), "--batch-size", str(batch)]
    done = subprocess.run(
        [*map(str, command), *options],
        cwd=folder,  # pycma logs in the working folder
        env={**os.environ, **offline, **caches},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return [Population(**row) for row in json.loads(done.stdout.splitlines()[-1])]


def run_sdjax(genome: Path, trials: int) -> list[Population]:
    """Return the candidates of sdjax's CMA-ES in groups of a population."""
    processor, evaluate = [], CandidateScorer.__call__

    def timed(self, *arguments, **options):
        start = time.process_time()
        result = evaluate(self, *arguments, **options)
        processor.append(time.process_time() - start)
        return result

    with patch.object(CandidateScorer, "__call__", timed):
        result = sdjax.tune(
            str(genome),
            "arithmetic",
            budget=trials,
            optimizer="cmaes",
            max_new_tokens=MAX_NEW_TOKENS,
        )
    events = [event for event in result.trace if event["event"] == "evaluation"][:trials]
    populations = []
    for n in range(0, trials, POPULATION):
        group = events[n : n + POPULATION]
        populations.append(
            Population(
                seconds=sum(event["seconds"] for event in group),
                processor=sum(processor[n : n + POPULATION]),
                scores=[event["score"] for event in group],
            )
        )
    return populations


def print_row(name: str, populations: list[Population]) -> tuple[float, float]:
    """Print what a search did after its first population.

    Returns:
        candidates per minute, and processor seconds per candidate.
    """
    later = populations[1:]
    count = sum(len(one.scores) for one in later)
    seconds = sum(one.seconds for one in later)
    rate, cost = 60 * count / seconds, sum(one.processor for one in later) / count
    found = {
        "name": name,
        "first population, s": round(populations[0].seconds, 1),
        "candidates after it": count,
        "seconds": round(seconds, 2),
        "candidates per minute": round(rate, 1),
        "processor seconds per candidate": round(cost, 2),
        "best score": round(max(max(one.scores) for one in populations), 4),
    }
    print(json.dumps(found), flush=True)
    return rate, cost


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
    python, rows = arguments.mergekit.absolute(), []
    theirs = foreign_versions(python, *PACKAGES)
    print(f"{describe_environment()}; {theirs}", flush=True)
    for batch in arguments.batch_size or (64,):
        populations = run_mergekit(python, genome, arguments.trials, batch)
        rows.append(print_row(f"mergekit-evolve, batch {batch}", populations))
    ours = print_row("sdjax", run_sdjax(genome, arguments.trials))
    best, least = max(rate for rate, _ in rows), min(cost for _, cost in rows)
    print(
        f"sdjax evaluates {ours[0] / best:.1f} times as many candidates per minute, with "
        f"{least / ours[1]:.1f} times less processor time each"
    )


if __name__ == "__main__":
    main()
