"""`sdjax merge` beside mergekit 0.1.5, whole processes: wall, user time and peak memory.

    python benchmarks/merge/make_checkpoints.py --size 135m --out /tmp/merge
    python benchmarks/merge/whole_process.py --models /tmp/merge/135m \
        --mergekit /tmp/mk/bin/mergekit-yaml --repeat 3

Both merge the same folders by the same recipe, turn by turn, into a fresh folder that is deleted
again. Nothing goes from one process to the next but the files in the system's memory, for both.
The last row is sdjax's fixed cost: the same on a checkpoint of a hundred thousand parameters
(`--size tiny`, beside the other), which is nearly all start and compilation.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

THREE = ("first", "second", "third")
WEIGHTED = {"weight": 0.4}


def recipe(
    method: str,
    models: tuple[str, ...] = THREE,
    *,
    each: dict[str, Any] | None = None,
    base: bool = True,
    **parameters: Any,
) -> dict[str, Any]:
    """A recipe as mergekit reads it; model names are folders beside one another."""
    found: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": name} | ({"parameters": each} if each else {}) for name in models],
        "dtype": "bfloat16",
    }
    if base:
        found["base_model"] = "base"
    if parameters:
        found["parameters"] = parameters
    return found


RECIPES = {
    "linear": recipe("linear", each={"weight": 0.3}, base=False),
    "slerp": recipe("slerp", ("base", "first"), t=0.5),
    "nuslerp": recipe("nuslerp", ("first", "second"), each={"weight": 0.5}, base=False),
    "multislerp": recipe("multislerp", each={"weight": 0.3}, base=False),
    "karcher": recipe("karcher", base=False),
    "task_arithmetic": recipe("task_arithmetic", each=WEIGHTED),
    "ties": recipe("ties", each={"weight": 0.4, "density": 0.5}),
    "dare_linear": recipe("dare_linear", each={"weight": 0.4, "density": 0.5}),
    "dare_ties": recipe("dare_ties", each={"weight": 0.4, "density": 0.5}),
    "breadcrumbs": recipe("breadcrumbs", each={"weight": 0.4, "density": 0.9, "gamma": 0.01}),
    "breadcrumbs_ties": recipe(
        "breadcrumbs_ties", each={"weight": 0.4, "density": 0.9, "gamma": 0.01}
    ),
    "della": recipe("della", each={"weight": 0.4, "density": 0.5, "epsilon": 0.1}),
    "della_linear": recipe("della_linear", each={"weight": 0.4, "density": 0.5, "epsilon": 0.1}),
    "model_stock": recipe("model_stock"),
    "sce": recipe("sce", select_topk=0.5),
    "arcee_fusion": recipe("arcee_fusion", ("first",)),
    "nearswap": recipe("nearswap", ("first",), t=0.001),
    "ram": recipe("ram"),
    "ramplus_tl": recipe("ramplus_tl"),
    "passthrough": recipe("passthrough", ("first",), base=False),
}


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One process. wall, user: seconds; peak: GiB of resident memory."""

    wall: float
    user: float
    peak: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml of its own environment")
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--scratch", type=Path, help="where results go; by default beside models")
    parser.add_argument("--best", action="store_true", help="the best reading, not the median")
    options = parser.parse_args()
    scratch = options.scratch or options.models.absolute().parent
    choose = min if options.best else statistics.median
    versions = ", ".join(f"{n} {importlib.metadata.version(n)}" for n in ("sdjax", "jax"))
    print(f"{cpu()}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}")
    told = "best" if options.best else "median"
    print(f"{options.models}, results in {scratch}: {told} of {options.repeat};")
    print("wall seconds (least to most), user, peak\n")
    print("| method | mergekit s | user | GiB | sdjax s | user | GiB | times as fast | memory |")
    print("|---|---|---|---|---|---|---|---|---|")
    ours = [str(Path(sys.executable).with_name("sdjax")), "merge"]
    theirs = options.mergekit and [str(options.mergekit.absolute())]
    for method in options.methods.split(","):
        readings: dict[str, list[Reading]] = {"theirs": [], "ours": []}
        for _ in range(options.repeat):
            if theirs:
                readings["theirs"].append(measure(theirs, options.models, RECIPES[method], scratch))
            readings["ours"].append(measure(ours, options.models, RECIPES[method], scratch))
        print(row(method, readings["theirs"], readings["ours"], choose), flush=True)
    tiny = options.models.with_name("tiny")
    if tiny.is_dir():
        fixed = [measure(ours, tiny, RECIPES["ties"], scratch) for _ in range(options.repeat)]
        print(row("(fixed cost: ties on tiny)", [], fixed, choose))


def row(method: str, theirs: list[Reading], ours: list[Reading], choose) -> str:
    def cells(readings: list[Reading]) -> list[str]:
        if not readings:
            return ["", "", ""]
        walls = [one.wall for one in readings]
        return [
            f"{choose(walls):.1f} ({min(walls):.1f} to {max(walls):.1f})",
            f"{choose([one.user for one in readings]):.1f}",
            f"{choose([one.peak for one in readings]):.2f}",
        ]

    ratios = ["", ""]
    if theirs:
        ratios = [
            f"{choose([x.wall for x in theirs]) / choose([x.wall for x in ours]):.1f}",
            f"{choose([x.peak for x in ours]) / choose([x.peak for x in theirs]):.2f}",
        ]
    return f"| {' | '.join([method, *cells(theirs), *cells(ours), *ratios])} |"


def measure(command: list[str], models: Path, recipe: dict[str, Any], beside: Path) -> Reading:
    """Runs one merge; ends the benchmark where it fails."""
    models = models.absolute()
    with tempfile.TemporaryDirectory(dir=beside) as scratch:
        written = Path(scratch, "recipe.yaml")
        written.write_text(yaml.safe_dump(placed(recipe, models)))
        log = Path(scratch, "log")
        start = time.perf_counter()
        with log.open("wb") as output:
            pid = os.posix_spawn(
                command[0],
                [*command, str(written), str(Path(scratch, "out"))],
                os.environ
                | {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"},
                file_actions=[
                    (os.POSIX_SPAWN_DUP2, output.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, output.fileno(), 2),
                ],
            )
        _, status, usage = os.wait4(pid, 0)
        wall = time.perf_counter() - start
        if status:
            raise SystemExit(f"{command[0]} failed: {log.read_text(errors='replace')[-2000:]}")
        shutil.rmtree(Path(scratch, "out"))
    return Reading(wall=wall, user=usage.ru_utime, peak=usage.ru_maxrss / 2**20)


def placed(recipe: dict[str, Any], models: Path) -> dict[str, Any]:
    """The recipe with the models' paths for their names."""
    found = recipe | {
        "models": [one | {"model": str(models / one["model"])} for one in recipe["models"]]
    }
    return found | ({"base_model": str(models / "base")} if "base_model" in recipe else {})


def cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))


if __name__ == "__main__":
    main()
