"""Compare searches that change their base with one that keeps its seed, at equal budgets.

    python -m benchmarks.learning.coevolution --out runs/coevolution

Each search of a seed stops when its programs have evaluated --budget development problems: one that
keeps its seed, one whose task vectors are recomputed on each new base, and one that keeps those of
the seed. All have the same generator, memory and training, and the same random seeds. Each result
is a row, a JSON file in --rows; the same command resumes, and `--table` prints from the rows alone.

The best program of a search is chosen by confirmation score, as in a run. Searches that change
their base have decided about it on the same problems, which favors their promoted programs among
their own; the test problems, on which the searches are compared, have decided nothing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from benchmarks.learning.arm_search import run_arm
from benchmarks.learning.arm_settings import KNOWN, SHARED, Arm
from benchmarks.learning.arm_table import read_rows
from sdjax.core.errors import UserError
from sdjax.core.logging import configure_logging
from sdjax.evaluation.statistics import paired_difference, percent
from sdjax.io.atomic_write import write_file
from sdjax.report.coevolution import promotion_rows
from sdjax.search.config import read_config
from sdjax.search.store import Store
from sdjax.search.types import SEARCH

ROWS = Path(__file__).with_name("rows") / "coevolution"
PLAIN = "seed kept"
OPTIONS = {
    PLAIN: "coevolution=null",
    "recomputed": "coevolution={task_vectors: recomputed}",
    "kept": "coevolution={task_vectors: kept}",
}


def main() -> None:
    options = _parser().parse_args()
    options.rows = options.rows or (ROWS if options.table else options.out / "rows")
    configure_logging()
    try:
        if not options.table:
            # The searches share executables, which take up to half of the time.
            jax.config.update("jax_compilation_cache_dir", str(options.out / "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
            options.rows.mkdir(parents=True, exist_ok=True)
            for seed in options.only:
                for name in OPTIONS:
                    _run(options, name, seed)
        print("\n".join(table(options.rows)))
    except UserError as error:
        sys.exit(f"{error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="demo")
    parser.add_argument("--out", type=Path, default=Path("runs/coevolution"))
    parser.add_argument(
        "--rows", type=Path, help=f"folder of the rows  [default: OUT/rows; with --table {ROWS}]"
    )
    parser.add_argument("--only", type=int, nargs="+", default=list(range(5)), metavar="SEED")
    parser.add_argument("--budget", type=int, default=24_000, help="evaluated problems per search")
    parser.add_argument("--arm", default="trained", choices=[n for n in KNOWN if n != "random"])
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser


def _run(options: argparse.Namespace, name: str, seed: int) -> None:
    """Compute the row of an option and a random seed, unless it is there."""
    path = options.rows / f"{name.replace(' ', '_')}-{seed}.json"
    if path.exists():
        return
    arm = Arm(name=name, settings=(*KNOWN[options.arm].settings, OPTIONS[name]))
    settings = (*SHARED, *options.set, f"rng_seed={seed}", f"tuning.search.seed={seed}")
    config = read_config(options.config, [*settings, *arm.settings])
    folder = options.out / path.stem
    row: dict[str, Any] = {"arm": name, "seed": seed, "shared": list(settings)}
    row |= run_arm(arm, config, folder, options.budget)
    with Store.open(folder) as store:
        decisions = [one for one in promotion_rows(store) if one.purpose == SEARCH]
    row["promotions"] = [vars(one) for one in decisions]
    write_file(path, json.dumps(row, indent=1) + "\n")
    print(f"{path}: written", flush=True)


def table(folder: Path) -> list[str]:
    """Return the lines of the table of all rows in a folder.

    Raises:
        UserError: there are no rows.
    """
    rows = read_rows(folder)
    lines = [
        "| task vectors | seeds | promotions | best (dev.) | test, as written | test, tuned | "
        "tuned minus seed kept [95 %] |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in (one for one in OPTIONS if one in rows):
        found = rows[name]
        promotions = [
            sum("next base" in one["decision"] for one in row["promotions"])
            for row in found.values()
        ]
        best = [row["points"][-1]["best"] for row in found.values()]
        tested = {form: _accuracies(found, form) for form in ("written", "tuned")}
        means = [percent(_mean(list(tested[form].values()))) for form in tested]
        difference = "–"
        if name != PLAIN and PLAIN in rows:
            plain = _accuracies(rows[PLAIN], "tuned")
            common = sorted(tested["tuned"].keys() & plain.keys())
            if common:
                pair = [tested["tuned"][n] for n in common], [plain[n] for n in common]
                difference = paired_difference(*pair).in_percent(signed=True)
        cells = [name, str(len(found)), f"{np.mean(promotions):.1f}", percent(_mean(best))]
        lines.append(f"| {' | '.join([*cells, *means, difference])} |")
    return lines


def _accuracies(rows: dict[int, dict[str, Any]], form: str) -> dict[int, float]:
    """Return the test accuracy of the best program by seed, for seeds that have one."""
    answers = {seed: row["points"][-1].get(form, {}).get("test") for seed, row in rows.items()}
    return {seed: digits.count("1") / len(digits) for seed, digits in answers.items() if digits}


def _mean(values: list[float]) -> float | None:
    return float(np.mean(values)) if values else None


if __name__ == "__main__":
    main()
