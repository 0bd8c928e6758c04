"""Both sides' numbers beside one another: `python benchmarks/training/compare.py DIR`.

Reads what trl_side.py and sdjax_side.py left in DIR.
"""

import math
import sys
from pathlib import Path

import numpy as np


def main(work: Path) -> None:
    print("| | asked | whole | LoRA rank 16 |")
    print("|---|---|---|---|")
    both = {
        kind: tuple(np.load(work / f"{side}-{kind}.npz") for side in ("sdjax", "trl"))
        for kind in ("whole", "lora")
    }
    rows = {
        "loss at step 1, from log 2": (
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
        "loss at step 6, from log 2": (
            "> 0.05",
            lambda a, b: f"{abs(a['losses'][-1] - math.log(2)):.3f}",
        ),
        "loss at step 6, from TRL's": (
            "1e-3",
            lambda a, b: f"{abs(a['losses'][-1] - b['losses'][-1]):.1e}",
        ),
        "seconds a step, TRL": ("", lambda a, b: spread(b["times"])),
        "seconds a step, sdjax": ("", lambda a, b: spread(a["times"])),
        "ratio": ("≤ 0.6", lambda a, b: f"{median(a['times']) / median(b['times']):.2f}"),
        "compilation, s": ("", lambda a, b: f"{a['compilation']:.0f}"),
        "peak memory, TRL, GB": ("", lambda a, b: f"{b['memory'] / 1e9:.2f}"),
        "peak memory, sdjax, GB": ("≤ TRL's", lambda a, b: f"{a['memory'] / 1e9:.2f}"),
    }
    for name, (asked, figure) in rows.items():
        cells = " | ".join(figure(*both[kind]) for kind in ("whole", "lora"))
        print(f"| {name} | {asked} | {cells} |")
    ours, theirs = (np.load(work / f"{side}-sft.npz")["losses"] for side in ("sdjax", "trl"))
    largest = np.max(np.abs(ours / theirs - 1))
    print(f"\nSFT, {len(ours)} steps: losses differ by at most {largest:.1e}")


def gradient(ours, theirs) -> float:
    """Relative norm of the difference; TRL's is behind the clipping of neither side."""
    difference = size = 0.0
    names = [name for name in theirs if name.startswith("gradient/")]
    assert set(names) == {name for name in ours if name.startswith("gradient/")}
    for name in names:
        difference += float(np.square(ours[name].astype(np.float64) - theirs[name]).sum())
        size += float(np.square(theirs[name].astype(np.float64)).sum())
    return math.sqrt(difference / size)


def median(times: np.ndarray) -> float:
    """Of the steps 2 to 6."""
    return float(np.median(times[1:]))


def spread(times: np.ndarray) -> str:
    return f"{median(times):.2f} ({min(times[1:]):.2f} to {max(times[1:]):.2f})"


if __name__ == "__main__":
    main(Path(sys.argv[1]))
