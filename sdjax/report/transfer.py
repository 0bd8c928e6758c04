"""Results of a transfer to other experts, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from sdjax.core.visible import visible
from sdjax.evaluation.statistics import Interval, paired_by_key
from sdjax.report.results import TestRow, cut_middle, result_rows
from sdjax.report.terminal import COLUMN_GAP, TABLE_WIDTH, gain_text, plain_table, rows_table
from sdjax.search.baselines import expert_entry
from sdjax.search.config import RunConfig
from sdjax.search.entry_names import display_name
from sdjax.search.ranking import complete_scores
from sdjax.search.store import Store
from sdjax.search.transfer import Transfer
from sdjax.search.types import TEST, Entry, RunInput, program_entry
from sdjax.search.winners import Winners

FORMAT = 2
_RUN, _HERE = "run", "here"
_COLUMNS = ("method", "tuned on", "numbers", "difference [95 %]")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A program that was transferred, compared with a method.

    Attributes:
        program: entry name of the program.
        method: entry name of the method.
        tuned_on: the experts that the method's numbers were selected on: "run", "here" or both.
        best_on: those of them on which the method has the best development score.
        numbers: how many numbers a search has tuned; None for a point of a grid.
        gain: accuracy of the program minus that of the method, paired by problem.
    """

    program: str
    method: str
    tuned_on: str
    best_on: str
    numbers: int | None
    gain: Interval


@dataclass(frozen=True, kw_only=True)
class TransferResults:
    """The results of a transfer.

    Attributes:
        rows: the test results of the base, the experts, the methods and the programs.
        comparisons: each program with each method.
    """

    rows: tuple[TestRow, ...]
    comparisons: tuple[Comparison, ...]


def transfer_results(store: Store, result: Transfer) -> TransferResults:
    """Return the test results of a transfer.

    Args:
        store: the store of the transfer.
        result: the transfer.
    """
    metric = result.config.task.metric
    programs = [program_entry(one.identity) for one in result.winners.programs]
    tuned_on = dict.fromkeys((*result.untouched, *programs), _RUN)
    for name in result.tuned:
        tuned_on[name] = f"{tuned_on[name]}, {_HERE}" if name in tuned_on else _HERE
    experts = [expert_entry(slot) for slot in result.config.slots]
    methods = list(dict.fromkeys((*result.untouched, *result.tuned)))
    rows = result_rows(
        store,
        ["seed", *experts, *methods, *programs],
        metric,
        development=complete_scores(store, metric),
        ranks={name: rank for rank, name in enumerate(programs, 1)},
        method=None,
        tuned_on=tuned_on,
    )
    shown, entries = {row.name for row in rows}, store.by_key(Entry)
    correct = {
        name: {one.problem_id: getattr(one, metric) for one in store.outcomes(name, TEST)}
        for name in (*programs, *methods)
        if name in shown
    }
    best = {_RUN: next(iter(result.untouched), None), _HERE: next(iter(result.tuned), None)}
    comparisons = [
        Comparison(
            program=program,
            method=method,
            tuned_on=tuned_on[method],
            best_on=", ".join(kind for kind, name in best.items() if name == method),
            numbers=entries[method].detail.get("constants"),
            gain=paired_by_key(correct[program], correct[method]),
        )
        for program in programs
        for method in methods
        if program in correct and method in correct
    ]
    return TransferResults(rows=rows, comparisons=tuple(comparisons))


def transfer_table(
    results: TransferResults, result: Transfer, *, width: int = TABLE_WIDTH
) -> Group:
    """Return the tables for the terminal: the test results, and the best program's comparisons.

    Args:
        results: the results.
        result: the transfer.
        width: as in `sdjax.report.terminal.final_table`.
    """
    models = ", ".join(one.model for one in result.config.experts.values())
    title = f"Test accuracy (%), {visible(result.config.seed)} with {visible(models)}"
    table, notes = rows_table(results.rows, result.config.task.metric, title=title, width=width)
    notes.append(
        "tuned on: run = selected with the experts of the run, and applied untouched; here = "
        "selected by the development problems with these experts, from the run's grids or by a "
        "search"
    )
    notes += [
        f"{display_name(name)} cannot merge these models: {visible(reason)}"
        for name, reason in result.refused.items()
    ]
    best = next((row.name for row in results.rows if row.is_answer), None)
    comparisons = [one for one in results.comparisons if one.program == best]
    if best is None or not comparisons:
        return Group(table, *map(Text, notes))
    note = "* best development score of these methods; intervals are paired by problem"
    compared = _comparison_table(best, comparisons, width)
    return Group(table, *map(Text, notes), Text(), compared, Text(note))


def _comparison_table(program: str, comparisons: Sequence[Comparison], width: int) -> Table:
    rows = [
        (
            visible(display_name(one.method)),
            _starred(one),
            "" if one.numbers is None else str(one.numbers),
            one.gain.in_percent(signed=True),
        )
        for one in comparisons
    ]
    table = plain_table(f"{display_name(program)} minus each method, points on the test problems")
    taken = sum(
        max(map(len, column)) + COLUMN_GAP for column in list(zip(_COLUMNS, *rows, strict=True))[1:]
    )
    for number, header in enumerate(_COLUMNS):
        table.add_column(Text(header), justify="left" if number < 2 else "right", no_wrap=True)
    for (name, *cells), one in zip(rows, comparisons, strict=True):
        shown = Text(cut_middle(name, max(width - taken - COLUMN_GAP, 8)))
        table.add_row(shown, *map(Text, cells[:-1]), gain_text(one.gain))
    return table


def _starred(comparison: Comparison) -> str:
    best = comparison.best_on.split(", ")
    kinds = comparison.tuned_on.split(", ")
    return ", ".join(f"{kind}*" if kind in best else kind for kind in kinds)


def transfer_json(
    store: Store, results: TransferResults, result: Transfer, run: Path
) -> dict[str, Any]:
    """Return everything about a transfer as JSON-compatible data.

    Args:
        store: the store of the transfer.
        results: the results.
        result: the transfer.
        run: folder of the run.
    """
    config, entries = result.config, store.by_key(Entry)
    outcomes = {row.name: store.outcomes(row.name, TEST) for row in results.rows}
    problems = [one.problem_id for one in next(iter(outcomes.values()), ())]
    return {
        "format": FORMAT,
        "request": {
            "config": json.loads(json.dumps(config.to_json())),
            "inputs": {one.name: one.fingerprint for one in store.select(RunInput)},
            "untouched": json.loads(json.dumps(result.winners.untouched())),
        },
        "tuned": {name: dict(entries[name].detail) for name in result.tuned},
        "run": str(run),
        "base": config.seed,
        "experts": {slot: config.experts[slot].model for slot in config.slots},
        "scope": config.scope,
        "task": config.task.name,
        "metric": config.task.metric,
        "versions": dict(store.run().versions),
        "programs": {program_entry(one.identity): one.source for one in result.winners.programs},
        "refused": dict(result.refused),
        "rows": [
            {
                "name": row.name,
                "kind": row.kind,
                "rank": row.rank,
                "tuned_on": row.tuned_on,
                "development": row.development,
                "problems": row.problems,
                "strict": _interval(row.strict),
                "flexible": _interval(row.flexible),
                "strict_gain_over_base": _interval(row.strict_gain),
                "flexible_gain_over_base": _interval(row.flexible_gain),
            }
            for row in results.rows
        ],
        "comparisons": [
            {
                "program": one.program,
                "method": one.method,
                "tuned_on": one.tuned_on,
                "best_on": one.best_on,
                "numbers": one.numbers,
                "gain": _interval(one.gain),
            }
            for one in results.comparisons
        ],
        "problems": problems,
        "correct": {
            name: {
                metric: [int(getattr(one, metric)) for one in results]
                for metric in ("strict", "flexible")
            }
            for name, results in outcomes.items()
        },
    }


def read_transfer(
    data: Any, winners: Winners, request: Mapping[str, Any], config: RunConfig
) -> tuple[TransferResults, Transfer] | None:
    """Return the results and the transfer in a file, or None if it contains another transfer.

    Args:
        data: the content of the file, as of `transfer_json`.
        winners: what is to be transferred.
        request: what determines the results; see `sdjax.search.transfer.transfer_request`.
        config: config of the transfer.
    """
    programs = {program_entry(one.identity): one.source for one in winners.programs}
    try:
        if (data["format"], data["request"], data["programs"]) != (FORMAT, request, programs):
            return None
        results = TransferResults(
            rows=tuple(_row(row) for row in data["rows"]),
            comparisons=tuple(_comparison(one) for one in data["comparisons"]),
        )
        tuned = tuple(map(str, data["tuned"]))
        refused = {str(name): str(reason) for name, reason in data["refused"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):  # the file was changed
        return None
    return results, Transfer(config=config, winners=winners, tuned=tuned, refused=refused)


def _row(data: Mapping[str, Any]) -> TestRow:
    strict, flexible = _read_interval(data["strict"]), _read_interval(data["flexible"])
    if strict is None or flexible is None:
        raise ValueError("a row without an accuracy")
    return TestRow(
        name=str(data["name"]),
        kind=str(data["kind"]),
        rank=None if data["rank"] is None else int(data["rank"]),
        tuned_on=str(data["tuned_on"]),
        development=None if data["development"] is None else float(data["development"]),
        problems=int(data["problems"]),
        strict=strict,
        flexible=flexible,
        strict_gain=_read_interval(data["strict_gain_over_base"]),
        flexible_gain=_read_interval(data["flexible_gain_over_base"]),
        method_gain=None,
    )


def _comparison(data: Mapping[str, Any]) -> Comparison:
    gain = _read_interval(data["gain"])
    if gain is None:
        raise ValueError("a comparison without a difference")
    return Comparison(
        program=str(data["program"]),
        method=str(data["method"]),
        tuned_on=str(data["tuned_on"]),
        best_on=str(data["best_on"]),
        numbers=None if data["numbers"] is None else int(data["numbers"]),
        gain=gain,
    )


def _interval(interval: Interval | None) -> dict[str, float] | None:
    """Return mean and 95% bounds."""
    if interval is None:
        return None
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}


def _read_interval(data: Mapping[str, Any] | None) -> Interval | None:
    return None if data is None else Interval(**{key: float(one) for key, one in data.items()})
