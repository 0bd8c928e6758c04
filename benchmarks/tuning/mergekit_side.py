"""Run mergekit-evolve in its own environment and time its trials.

    VENV/bin/python benchmarks/tuning/mergekit_side.py GENOME TASKS STORAGE [--trials 21]
        [--workers 2] [--batch-size 64]

Prints JSON: the seconds, the processor seconds and the scores of each population.
`mergekit_evolve.py` next to this file writes GENOME and TASKS and calls it.

mergekit-evolve needs accelerators, and an lm-eval that imports its vLLM model without vLLM. No such
version runs with the transformers that mergekit needs. Four things are changed in memory so that it
runs on CPUs: Ray is started with accelerators that do not exist, one per worker; lm-eval's default
device, which mergekit-evolve does not choose, is the CPU; `torch.cpu` has an `empty_cache`; and an
empty module replaces lm-eval's vLLM model, which is not used.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from types import ModuleType

import psutil
import ray


def prepare() -> None:
    """Replace lm-eval's vLLM model and its default device in this process; see above."""
    import lm_eval.models
    import torch
    from lm_eval.models.huggingface import HFLM

    name = "lm_eval.models.vllm_causallms"
    lm_eval.models.vllm_causallms = sys.modules[name] = ModuleType(name)
    lm_eval.models.vllm_causallms.VLLM = type("VLLM", (), {"_create_model": None})
    torch.cpu.empty_cache = lambda: None
    construct = HFLM.__init__

    def construct_on_cpu(self, *arguments, device="cpu", **options):
        construct(self, *arguments, device=device, **options)

    HFLM.__init__ = construct_on_cpu


def processor_seconds() -> float:
    """Return the processor time of this process and all processes that it has started."""
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        try:
            times = process.cpu_times()
        except psutil.NoSuchProcess:  # it has ended
            continue
        total += times.user + times.system
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("genome", type=Path)
    parser.add_argument("tasks", type=Path)
    parser.add_argument("storage", type=Path)
    parser.add_argument("--trials", type=int, default=21)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64)
    options = parser.parse_args()
    prepare()
    from mergekit.evo import strategy
    from mergekit.scripts.evolve import main as evolve

    ray.init(
        num_gpus=options.workers,
        include_dashboard=False,
        runtime_env={"worker_process_setup_hook": prepare},
    )
    populations = []
    evaluate = strategy.ActorPoolEvaluationStrategy.evaluate_genotypes

    def timed(self, genotypes):
        start, used = time.perf_counter(), processor_seconds()
        results = evaluate(self, genotypes)
        populations.append(
            {
                "seconds": time.perf_counter() - start,
                "processor": processor_seconds() - used,
                "scores": [result["score"] for result in results],
            }
        )
        return results

    strategy.ActorPoolEvaluationStrategy.evaluate_genotypes = timed
    evolve.main(
        [
            str(options.genome),
            *("--max-fevals", str(options.trials)),
            *("--strategy", "pool"),
            *("--num-gpus", str(options.workers), "--no-merge-cuda", "--no-reshard"),
            *("--batch-size", str(options.batch_size), "--no-save-final-model"),
            *("--storage-path", str(options.storage), "--task-search-path", str(options.tasks)),
        ],
        standalone_mode=False,
    )
    sys.stdout.flush()
    print(json.dumps(populations), flush=True)


if __name__ == "__main__":
    main()
