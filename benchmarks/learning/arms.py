"""Compare searches with and without memory and training, random programs, and tuned merges.

    python -m benchmarks.learning.arms --out runs/arms

Every search of a seed stops when its programs have evaluated --budget development problems, and
each result is a row, a JSON file in --rows. The same command resumes, and computes only rows that
are missing. Processes can share the work (`--only 0 2 4` and `--only 1 3`). `--table` prints the
tables and draws the figure from the rows alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import jax

from benchmarks.learning.arm_controls import run_controls
from benchmarks.learning.arm_plot import draw
from benchmarks.learning.arm_search import run_arm
from benchmarks.learning.arm_settings import CONTROLS, KNOWN, SHARED, Arm, chosen_arms
from benchmarks.learning.arm_table import print_tables, read_rows
from sdjax.core.errors import UserError
from sdjax.core.logging import configure_logging
from sdjax.io.atomic_write import write_file
from sdjax.search.config import RunConfig, read_config

ROWS = Path(__file__).with_name("rows")
FAMILIES = ("weights", "slope", "layers")


def main() -> None:
    options = _parser().parse_args()
    options.rows = options.rows or (ROWS if options.table else options.out / ROWS.name)
    configure_logging()
    try:
        arms = chosen_arms(options.arms, options.arm)
        if not options.table:
            # Arms and processes share executables, which take up to half of the time.
            jax.config.update("jax_compilation_cache_dir", str(options.out / "compiled"))
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
            for seed in options.only:
                _run_seed(options, arms, seed)
        rows = read_rows(options.rows)
        print_tables(rows, {arm.name: arm.against for arm in (*KNOWN.values(), *arms)})
        if any(name != CONTROLS for name in rows):
            draw(rows, options.rows.with_name(f"{options.rows.name}.svg"))
    except UserError as error:
        sys.exit(f"{error}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", default="demo")
    parser.add_argument("--out", type=Path, default=Path("runs/arms"), help="folder of the runs")
    parser.add_argument(
        "--rows", type=Path, help=f"folder of the rows  [default: OUT/rows; with --table {ROWS}]"
    )
    parser.add_argument("--only", type=int, nargs="+", default=list(range(5)), metavar="SEED")
    parser.add_argument("--budget", type=int, default=24_000, help="evaluated problems per search")
    parser.add_argument("--arms", nargs="*", default=[], metavar="ARM", help=", ".join(KNOWN))
    parser.add_argument(
        "--arm",
        nargs="+",
        action="append",
        default=[],
        metavar=("NAME", "ARM [KEY=VALUE"),
        help="another arm: its name, the arm that it changes, and assignments",
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for all arms and controls"
    )
    parser.add_argument("--controls", nargs="*", default=FAMILIES, metavar="FAMILY")
    parser.add_argument("--table", action="store_true", help="run nothing")
    return parser


def _run_seed(options: argparse.Namespace, arms: list[Arm], seed: int) -> None:
    """Compute the rows of a random seed that are missing."""
    shared = (*SHARED, *options.set, f"rng_seed={seed}", f"tuning.search.seed={seed}")
    options.rows.mkdir(parents=True, exist_ok=True)

    def config_of(*settings: str) -> RunConfig:
        return read_config(options.config, [*shared, *settings])

    # An arm whose settings this version refuses is an error before anything has been computed.
    configs = {arm.name: config_of(*arm.settings) for arm in arms}
    if options.controls and not (path := options.rows / f"{CONTROLS}-{seed}.json").exists():
        folder = options.out / path.stem
        row = run_controls(config_of(), folder, options.budget, options.controls)
        _write(path, {"arm": CONTROLS, "seed": seed, "shared": list(shared), **row})
    for arm in arms:
        path = options.rows / f"{arm.name}-{seed}.json"
        if not path.exists():
            row = run_arm(arm, configs[arm.name], options.out / path.stem, options.budget)
            _write(path, {"arm": arm.name, "seed": seed, "shared": list(shared), **row})


def _write(path: Path, row: dict[str, object]) -> None:
    write_file(path, json.dumps(row, indent=1) + "\n")
    print(f"{path}: written", flush=True)


if __name__ == "__main__":
    main()
