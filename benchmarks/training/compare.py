"""Compare training with sdjax and with TRL: parity, seconds per step, and peak memory.

    python -m benchmarks.training.compare full lora sft --model MODEL \\
        --problems GSM8K_TRAIN.jsonl --trl-python TRL_VENV/bin/python --work /tmp/tb

The script creates the pairs and the initial adapter, runs the two sides alternately in separate
processes, and prints tables of the results in WORK. `--under` is a wrapper command for each
process.
"""

import argparse
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

from benchmarks.environment import describe_environment

HERE = Path(__file__).parent
DPO_KINDS = ("full", "lora")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "kinds", nargs="*", metavar="full|lora|sft", help="if empty, only print the tables"
    )
    parser.add_argument("--model", required=True)
    parser.add_argument("--problems", required=True, help="gsm8k_train.jsonl")
    parser.add_argument("--trl-python", required=True, help="venv with TRL 1.16")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--under", default="", help="wrapper command for each process")
    options = parser.parse_args()

    def run(python: str, script: str, *arguments: object) -> None:
        command = [*shlex.split(options.under), python, str(HERE / script), *map(str, arguments)]
        environment = os.environ | {
            "JAX_PLATFORMS": "cpu",
            "PYTHONPATH": str(HERE.parent.parent),
            "HF_HUB_OFFLINE": "1",
        }
        subprocess.run(command, env=environment, stdout=sys.stderr, check=True)

    common = ["--work", options.work, "--model", options.model]
    adapter = ["--adapter", options.work / "adapter"]
    if options.kinds:
        run(sys.executable, "pairs.py", options.problems, options.model, options.work)
    if "lora" in options.kinds:
        shutil.rmtree(options.work / "adapter", ignore_errors=True)
        run(sys.executable, "sdjax_side.py", "adapter", *common, *adapter)
    for kind in options.kinds:
        extra = adapter if kind == "lora" else []
        run(sys.executable, "sdjax_side.py", kind, *common, *extra)
        run(options.trl_python, "trl_side.py", kind, *common, *extra)
    tables(options.work)


def tables(work: Path) -> None:
    versions = {
        name: version
        for path in sorted(work.glob("*.npz"))
        for name, version in json.loads(str(np.load(path)["versions"])).items()
    }
    print(f"{describe_environment()}, {versions}\n")
    if (work / "sdjax-full.npz").exists() and (work / "sdjax-lora.npz").exists():
        preferences(work)
    if (work / "sdjax-sft.npz").exists():
        ours, theirs = (np.load(work / f"{side}-sft.npz")["losses"] for side in ("sdjax", "trl"))
        largest = np.max(np.abs(ours / theirs - 1))
        print(f"SFT, {len(ours)} steps: losses differ by at most {largest:.1e}, relative")


def preferences(work: Path) -> None:
    print("| | target | full | LoRA rank 16 |")
    print("|---|---|---|---|")
    both = {
        kind: tuple(np.load(work / f"{side}-{kind}.npz") for side in ("sdjax", "trl"))
        for kind in DPO_KINDS
    }
    rows = {
        "loss at step 1, difference from log 2": (
            "1e-6",
            lambda a, b: f"{abs(a['losses'][0] - math.log(2)):.1e}",
        ),
        "gradient of step 1, relative norm of the difference": (
            "1e-4",
            lambda a, b: f"{gradient(a, b):.1e}",
        ),
        "log-probabilities, largest relative difference": (
            "1e-4",
            lambda a, b: f"{np.max(np.abs(a['logprobs'] / b['logprobs'] - 1)):.1e}",
        ),
        "loss at step 6, difference from log 2": (
            "> 0.05",
            lambda a, b: f"{abs(a['losses'][-1] - math.log(2)):.3f}",
        ),
        "loss at step 6, difference from TRL": (
            "1e-3",
            lambda a, b: f"{abs(a['losses'][-1] - b['losses'][-1]):.1e}",
        ),
        "seconds per step, TRL": ("", lambda a, b: spread(b["times"])),
        "seconds per step, sdjax": ("", lambda a, b: spread(a["times"])),
        "ratio": ("≤ 0.6", lambda a, b: f"{median(a['times']) / median(b['times']):.2f}"),
        "compilation, s": ("", lambda a, b: f"{a['compilation']:.0f}"),
        "peak memory, TRL, GB": ("", lambda a, b: f"{b['memory'] / 1e9:.2f}"),
        "peak memory, sdjax, GB": ("≤ TRL's", lambda a, b: f"{a['memory'] / 1e9:.2f}"),
    }
    for name, (target, figure) in rows.items():
        cells = " | ".join(figure(*both[kind]) for kind in DPO_KINDS)
        print(f"| {name} | {target} | {cells} |")
    print()


def gradient(ours, theirs) -> float:
    """Return the relative norm of the difference of the unclipped gradients."""
    difference = size = 0.0
    names = [name for name in theirs if name.startswith("gradient/")]
    assert set(names) == {name for name in ours if name.startswith("gradient/")}
    for name in names:
        difference += float(np.square(ours[name].astype(np.float64) - theirs[name]).sum())
        size += float(np.square(theirs[name].astype(np.float64)).sum())
    return math.sqrt(difference / size)


def median(times: np.ndarray) -> float:
    """Return the median over steps 2 to 6."""
    return float(np.median(times[1:]))


def spread(times: np.ndarray) -> str:
    return f"{median(times):.2f} ({min(times[1:]):.2f} to {max(times[1:]):.2f})"


if __name__ == "__main__":
    main()
