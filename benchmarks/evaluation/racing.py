"""Simulate races between the entries of a finished run, from its stored outcomes.

    python -m benchmarks.evaluation.racing RUN

Prints, per value of `z`, the share of the evaluations that a race uses and how often it keeps all
five best entries, over random orders of the problems. The second table contains only the entries
within `--close` points of the best one, where a race cannot save much. Entries that were tuned and
ablations are left out, since a run races neither.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from benchmarks.environment import describe_environment
from sdjax.evaluation.racing import Race, race
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, Entry


def outcome_table(folder: Path, metric: str) -> np.ndarray:
    """Return bool [entries, problems] of the complete development evaluations that can race."""
    with Store.open(folder) as store:
        rows, entries = [], store.by_key(Entry)
        for summary in store.summaries(DEVELOPMENT):
            if summary.complete and can_race(entries[summary.entry]):
                outcomes = store.outcomes(summary.entry, DEVELOPMENT)
                outcomes = sorted(outcomes, key=lambda outcome: outcome.problem_id)
                rows.append([getattr(outcome, metric) for outcome in outcomes])
    return np.array(rows)


def can_race(entry: Entry) -> bool:
    """Return whether an entry is neither an ablation nor the result of tuning."""
    return entry.kind != "ablation" and not entry.detail.keys() & {"tuned_from", "family"}


def simulate(table: np.ndarray, rules: Race, orders: int) -> tuple[float, float]:
    """Return the share of evaluations used, and of the orders that keep the best entries."""
    best = np.argsort(-table.mean(1), kind="stable")[: rules.winners]
    names = [str(i) for i in range(len(table))]
    used, kept = [], []
    for seed in range(orders):
        shuffled = table[:, np.random.default_rng(seed).permutation(table.shape[1])]
        correct = race(names, lambda name, n, s=shuffled: s[int(name), :n], table.shape[1], rules)
        used.append(sum(map(len, correct.values())) / table.size)
        kept.append(all(len(correct[str(index)]) == table.shape[1] for index in best))
    return float(np.mean(used)), float(np.mean(kept))


def main() -> None:
    """Run the simulation."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--metric", default="strict", choices=["strict", "flexible"])
    parser.add_argument("--orders", type=int, default=200)
    parser.add_argument("--close", type=float, default=1.0, help="Percentage points.")
    options = parser.parse_args()
    table = outcome_table(options.run, options.metric)
    print(describe_environment())
    accuracy = table.mean(1)
    close = table[accuracy >= accuracy.max() - options.close / 100]
    for title, rows in (("all entries", table), (f"within {options.close:g} points", close)):
        print(f"{title}: {len(rows)} entries, {rows.shape[1]} problems, {options.orders} orders")
        for z in (0.0, 1.0, 1.5, 2.0, 3.0):
            used, kept = simulate(rows, Race(z=z), options.orders)
            print(f"  z = {z:g}: {used:.3f} of the evaluations, best 5 kept in {kept:.3f}")


if __name__ == "__main__":
    main()
