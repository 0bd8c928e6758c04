"""Compare processes of `sdjax merge` and mergekit 0.1.5: wall time, user time and peak memory.

    python benchmarks/merge/make_checkpoints.py --size 135m --out /tmp/merge
    python -m benchmarks.merge.whole_process --models /tmp/merge/135m \
        --mergekit /tmp/mk/bin/mergekit-yaml --repeat 3

The two run alternately, merging the same models with the same recipe into a new folder that is then
deleted. Processes share only the page cache. The last row is the fixed cost of sdjax: merging
checkpoints of 100,000 parameters (`--size tiny`, in the same folder), which is nearly all startup
and compilation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.environment import describe_environment

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
    """Return a recipe; models are names of folders in one directory."""
    result: dict[str, Any] = {
        "merge_method": method,
        "models": [{"model": name} | ({"parameters": each} if each else {}) for name in models],
        "dtype": "bfloat16",
    }
    if base:
        result["base_model"] = "base"
    if parameters:
        result["parameters"] = parameters
    return result


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
class Measurement:
    """Wall and user time of a process in seconds, and peak resident memory in GiB."""

    wall: float
    user: float
    peak: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=Path, required=True)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml in its own environment")
    parser.add_argument("--methods", default=",".join(RECIPES))
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument(
        "--scratch", type=Path, help="output folder; defaults to the models' folder"
    )
    parser.add_argument(
        "--best", action="store_true", help="report the best run instead of the median"
    )
    options = parser.parse_args()
    scratch = options.scratch or options.models.absolute().parent
    choose = min if options.best else statistics.median
    print(describe_environment())
    statistic = "best" if options.best else "median"
    print(f"{options.models}, results in {scratch}: {statistic} of {options.repeat};")
    print("wall seconds (range), user seconds, peak memory\n")
    print(
        "| method | mergekit s | user s | GiB | sdjax s | user s | GiB | speedup | memory ratio |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    sdjax = [str(Path(sys.executable).with_name("sdjax")), "merge"]
    mergekit = options.mergekit and [str(options.mergekit.absolute())]
    for method in options.methods.split(","):
        runs: dict[str, list[Measurement]] = {"mergekit": [], "sdjax": []}
        for _ in range(options.repeat):
            if mergekit:
                runs["mergekit"].append(measure(mergekit, options.models, RECIPES[method], scratch))
            runs["sdjax"].append(measure(sdjax, options.models, RECIPES[method], scratch))
        print(row(method, runs["mergekit"], runs["sdjax"], choose), flush=True)
    tiny = options.models.with_name("tiny")
    if tiny.is_dir():
        fixed = [measure(sdjax, tiny, RECIPES["ties"], scratch) for _ in range(options.repeat)]
        print(row("(fixed cost: ties on tiny)", [], fixed, choose))


def row(method: str, mergekit: list[Measurement], sdjax: list[Measurement], choose) -> str:
    def cells(runs: list[Measurement]) -> list[str]:
        if not runs:
            return ["", "", ""]
        walls = [run.wall for run in runs]
        return [
            f"{choose(walls):.1f} ({min(walls):.1f} to {max(walls):.1f})",
            f"{choose([run.user for run in runs]):.1f}",
            f"{choose([run.peak for run in runs]):.2f}",
        ]

    ratios = ["", ""]
    if mergekit:
        ratios = [
            f"{choose([x.wall for x in mergekit]) / choose([x.wall for x in sdjax]):.1f}",
            f"{choose([x.peak for x in sdjax]) / choose([x.peak for x in mergekit]):.2f}",
        ]
    return f"| {' | '.join([method, *cells(mergekit), *cells(sdjax), *ratios])} |"


def measure(command: list[str], models: Path, recipe: dict[str, Any], parent: Path) -> Measurement:
    """Run a merge and measure it; exit if it fails."""
    models = models.absolute()
    with tempfile.TemporaryDirectory(dir=parent) as scratch:
        recipe_path = Path(scratch, "recipe.yaml")
        recipe_path.write_text(yaml.safe_dump(with_paths(recipe, models)))
        log = Path(scratch, "log")
        start = time.perf_counter()
        with log.open("wb") as output:
            pid = os.posix_spawn(
                command[0],
                [*command, str(recipe_path), str(Path(scratch, "out"))],
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
    return Measurement(wall=wall, user=usage.ru_utime, peak=usage.ru_maxrss / 2**20)


def with_paths(recipe: dict[str, Any], models: Path) -> dict[str, Any]:
    """Return the recipe with model names replaced by paths."""
    entries = [entry | {"model": str(models / entry["model"])} for entry in recipe["models"]]
    return (recipe | {"models": entries}) | (
        {"base_model": str(models / "base")} if "base_model" in recipe else {}
    )


if __name__ == "__main__":
    main()
