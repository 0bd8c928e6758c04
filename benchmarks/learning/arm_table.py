"""The tables of the comparison, from its rows."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.learning.arm_settings import CONTROLS, KNOWN
from sdjax.core.errors import UserError
from sdjax.evaluation.statistics import Interval, paired_by_key, paired_difference, percent

# The rows of each arm by seed.
Rows = dict[str, dict[int, dict[str, Any]]]

_FORMS = {"written": "as written", "tuned": "tuned"}
# Fractions are shown in percent, counts as they are.
_MEASURES = {
    "best": "best",
    "top mean": "mean of top 10",
    "distinct": "distinct",
    "distinct share": "distinct %",
    "unique scores": "unique scores",
    "admissible share": "admissible %",
}
_COUNTS = ("distinct", "unique scores", "samples", "problems")


def read_rows(folder: Path) -> Rows:
    """Read all rows of a folder.

    Raises:
        UserError: there are none, or they have different budgets.
    """
    rows: Rows = {}
    for path in sorted(folder.glob("*-*.json")):
        row = json.loads(path.read_text())
        rows.setdefault(row["arm"], {})[row["seed"]] = row
    if not rows:
        raise UserError(f"{folder}: no rows; run without --table first, or give --rows")
    budgets = {row["budget"] for by_seed in rows.values() for row in by_seed.values()}
    if len(budgets) > 1:
        raise UserError(f"{folder}: rows with different budgets, {sorted(budgets)}; separate them")
    order = [CONTROLS, *KNOWN]
    return dict(sorted(rows.items(), key=lambda one: (*map(one[0].__ne__, order), one[0])))


def print_tables(rows: Rows, against: Mapping[str, str]) -> None:
    """Print all tables that the rows are enough for.

    Args:
        rows: the rows of arms and of the controls.
        against: name of the arm that each arm is compared with; empty for none.
    """
    arms = {name: by_seed for name, by_seed in rows.items() if name != CONTROLS}
    for environment in sorted(
        {row["environment"] for one in rows.values() for row in one.values()}
    ):
        print(environment)
    for name, by_seed in rows.items():
        print(f"{name}: seeds {', '.join(map(str, sorted(by_seed)))}")
    for lines in (
        _progress(arms),
        _differences(arms, against),
        _controls(rows.get(CONTROLS, {})),
        _test_gains(arms, rows.get(CONTROLS, {})),
        _transfer_gains(arms, rows.get(CONTROLS, {})),
    ):
        if len(lines) > 2:  # more than a header
            print("\n" + "\n".join(lines), flush=True)


def _progress(arms: Rows) -> list[str]:
    """Return means over the seeds at each point of the budget."""
    heads = ["arm", "budget", "problems", "samples", *_MEASURES.values()]
    lines = _header([*heads, *(f"test, {form}" for form in _FORMS.values())])
    for name, by_seed in arms.items():
        some = next(iter(by_seed.values()))
        for place in range(len(some["points"])):
            found = [row["points"][place] for row in by_seed.values()]
            cells = [name, f"{some['budget'] * (place + 1) // len(some['points']):,}"]
            cells += [_mean(found, key) for key in ("problems", "samples", *_MEASURES)]
            for form in _FORMS:
                tests = [_solved(one[form]["test"]).mean() for one in found if form in one]
                cells.append(percent(float(np.mean(tests))) if tests else "–")
            lines.append(_line(cells))
    return lines


def _differences(arms: Rows, against: Mapping[str, str]) -> list[str]:
    """Return differences between arms at the whole budget, paired by seed."""
    lines = _header(["difference, whole budget", "seeds", *_MEASURES.values()])
    for name, by_seed in arms.items():
        other = arms.get(against.get(name, ""), {})
        seeds = sorted(by_seed.keys() & other.keys())
        if not seeds:
            continue
        cells = [f"{name} − {against[name]}", str(len(seeds))]
        for key in _MEASURES:
            ours, theirs = (
                {seed: one[seed]["points"][-1][key] for seed in seeds} for one in (by_seed, other)
            )
            gain = paired_by_key(ours, theirs)
            cells.append(_count_gain(gain) if key in _COUNTS else gain.in_percent(signed=True))
        lines.append(_line(cells))
    return lines


def _controls(controls: Mapping[int, dict[str, Any]]) -> list[str]:
    """Return the mean scores of the tuned merges, with the experts and those of the transfer."""
    lines = _header(["tuned merge", "experts", "constants", "development", "confirmation", "test"])
    for key, experts in (("entries", "of the search"), ("transfer", "of the transfer")):
        found: dict[str, list[dict[str, Any]]] = {}
        for row in controls.values():
            for entry in row.get(key, ()):
                found.setdefault(entry["entry"].removeprefix("method:"), []).append(entry)
        for name, entries in found.items():
            cells = [name, experts, str(entries[0]["constants"])]
            for split in ("development", "confirmation"):
                cells.append(percent(float(np.mean([one[split] for one in entries]))))
            cells.append(percent(float(np.mean([_solved(e["test"]).mean() for e in entries]))))
            lines.append(_line(cells))
    return lines


def _test_gains(arms: Rows, controls: Mapping[int, dict[str, Any]]) -> list[str]:
    """Return gains over the best control with as many constants, paired by problem."""
    heads = ["best program, test", "seeds", "constants", "solved", "control", "gain", "seeds above"]
    lines = _header(heads)
    for name, by_seed in arms.items():
        for form, shown in _FORMS.items():
            pairs, numbers = [], []
            for seed in sorted(by_seed.keys() & controls.keys()):
                program = by_seed[seed]["points"][-1].get(form)
                if program is not None:
                    control = _matched(controls[seed]["entries"], program["constants"])
                    pairs.append((_solved(program["test"]), _solved(control["test"])))
                    numbers.append(program["constants"])
            if pairs:
                span = " to ".join(map(str, dict.fromkeys((min(numbers), max(numbers)))))
                cells = [f"{name}, {shown}", str(len(pairs)), span, *_paired_cells(pairs)]
                lines.append(_line(cells))
    return lines


def _transfer_gains(arms: Rows, controls: Mapping[int, dict[str, Any]]) -> list[str]:
    """Return gains of untouched programs over task arithmetic that was tuned on the transfer."""
    heads = ["untouched, transfer experts", "seeds", "solved", "tuned task arithmetic", "gain"]
    lines = _header([*heads, "seeds above"])
    for name, by_seed in arms.items():
        for form, shown in _FORMS.items():
            pairs = []
            for seed in sorted(by_seed.keys() & controls.keys()):
                program = by_seed[seed]["points"][-1].get(form, {})
                if "transfer" in program and "transfer" in controls[seed]:
                    control = _matched(controls[seed]["transfer"], program["constants"])
                    pairs.append((_solved(program["transfer"]), _solved(control["test"])))
            if pairs:
                lines.append(_line([f"{name}, {shown}", str(len(pairs)), *_paired_cells(pairs)]))
    return lines


def _matched(entries: Sequence[dict[str, Any]], constants: int) -> dict[str, Any]:
    """Return the best tuned merge with at most as many constants, by its confirmation score.

    A program with fewer constants than every tuned merge is compared with the smallest of these.
    """
    tuned = [one for one in entries if one["constants"] > 0]
    limit = max(constants, min(one["constants"] for one in tuned))
    allowed = [one for one in tuned if one["constants"] <= limit]
    return max(allowed, key=lambda one: (one["confirmation"] or 0.0, one["development"]))


def _paired_cells(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> list[str]:
    """Return cells of a program and its control: the pairs are of seeds, [problems] each.

    The interval is over the problems: each of them has the mean over the seeds.
    """
    ours, theirs = (np.mean(side, axis=0) for side in zip(*pairs, strict=True))
    gain = paired_difference(ours.tolist(), theirs.tolist())
    above = sum(a.mean() > b.mean() for a, b in pairs)
    cells = [percent(float(ours.mean())), percent(float(theirs.mean()))]
    return [*cells, gain.in_percent(signed=True), f"{above} of {len(pairs)}"]


def _solved(digits: str) -> np.ndarray:
    return np.array([digit == "1" for digit in digits], dtype=np.float64)


def _mean(found: Iterable[Mapping[str, float]], key: str) -> str:
    mean = float(np.mean([one[key] for one in found]))
    return f"{mean:,.0f}" if key in _COUNTS else percent(mean)


def _count_gain(gain: Interval) -> str:
    return f"{gain.mean:+.0f} [{gain.low:+.0f}, {gain.high:+.0f}]"


def _header(names: Sequence[str]) -> list[str]:
    return [_line(names), "|" + "---|" * len(names)]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"
