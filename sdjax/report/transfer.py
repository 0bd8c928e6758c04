"""Results of a transfer to other experts, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.text import Text

from sdjax.core.visible import visible
from sdjax.evaluation.statistics import Interval
from sdjax.report.results import TestRow, result_rows
from sdjax.report.terminal import TABLE_WIDTH, gain_notes, rows_table
from sdjax.search.baselines import expert_entry
from sdjax.search.config import RunConfig
from sdjax.search.entry_names import display_name
from sdjax.search.ranking import complete_scores
from sdjax.search.store import Store
from sdjax.search.transfer import Transfer, Winners
from sdjax.search.types import TEST, RunInput, program_entry

FORMAT = 1
_RUN, _HERE = "run", "here"


def transfer_rows(store: Store, result: Transfer) -> tuple[TestRow, ...]:
    """Return the test results of the base, the experts, the methods and the programs.

    Args:
        store: the store of the transfer.
        result: the transfer.
    """
    winners = result.winners
    programs = [program_entry(one.identity) for one in winners.programs]
    tuned_on = dict.fromkeys((*winners.methods, *programs), _RUN)
    for name in result.tuned:
        tuned_on[name] = f"{tuned_on[name]}, {_HERE}" if name in tuned_on else _HERE
    experts = [expert_entry(slot) for slot in result.config.slots]
    return result_rows(
        store,
        dict.fromkeys(["seed", *experts, *winners.methods, *result.tuned, *programs]),
        result.config.task.metric,
        development=complete_scores(store, result.config.task.metric),
        ranks={name: rank for rank, name in enumerate(programs, 1)},
        method=next(iter(winners.methods), None),
        tuned_method=next(iter(result.tuned), None),
        tuned_on=tuned_on,
    )


def transfer_table(rows: Sequence[TestRow], result: Transfer, *, width: int = TABLE_WIDTH) -> Group:
    """Return the table for the terminal, with the comparisons of the best program below it.

    Args:
        rows: the rows.
        result: the transfer.
        width: as in `sdjax.report.terminal.final_table`.
    """
    models = ", ".join(one.model for one in result.config.experts.values())
    title = f"Test accuracy (%), {visible(result.config.seed)} with {visible(models)}"
    table, notes = rows_table(rows, result.config.task.metric, title=title, width=width)
    notes.append(
        "tuned on: run = selected with the experts of the run, and applied untouched; here = the "
        "best of the run's grids on the development problems with these experts"
    )
    untouched, tuned = (next(iter(names), None) for names in (result.winners.methods, result.tuned))
    notes += gain_notes(rows, untouched, "the run's best method, untouched")
    notes += gain_notes(rows, tuned, "the best method tuned here", tuned=True)
    notes += [
        f"{display_name(name)} cannot merge these models: {visible(reason)}"
        for name, reason in result.refused.items()
    ]
    return Group(table, *map(Text, notes))


def transfer_json(
    store: Store, rows: Sequence[TestRow], result: Transfer, run: Path
) -> dict[str, Any]:
    """Return everything about a transfer as JSON-compatible data.

    Args:
        store: the store of the transfer.
        rows: the rows.
        result: the transfer.
        run: folder of the run.
    """
    config = result.config
    outcomes = {row.name: store.outcomes(row.name, TEST) for row in rows}
    problems = [one.problem_id for one in next(iter(outcomes.values()), ())]
    return {
        "format": FORMAT,
        "request": {
            "config": json.loads(json.dumps(config.to_json())),
            "inputs": {one.name: one.fingerprint for one in store.select(RunInput)},
            "untouched": list(result.winners.methods),
        },
        "tuned": list(result.tuned),
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
                "gain_over_untouched_method": _interval(row.method_gain),
                "gain_over_tuned_method": _interval(row.tuned_gain),
            }
            for row in rows
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
) -> tuple[tuple[TestRow, ...], Transfer] | None:
    """Return the rows and the transfer in a file, or None if it contains another transfer.

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
        rows = tuple(_row(row) for row in data["rows"])
        tuned = tuple(map(str, data["tuned"]))
        refused = {str(name): str(reason) for name, reason in data["refused"].items()}
    except (AttributeError, KeyError, TypeError, ValueError):  # the file was changed
        return None
    return rows, Transfer(config=config, winners=winners, tuned=tuned, refused=refused)


def _row(data: Mapping[str, Any]) -> TestRow:
    def interval(key: str) -> Interval | None:
        found = data[key]
        return None if found is None else Interval(**{k: float(v) for k, v in found.items()})

    strict, flexible = interval("strict"), interval("flexible")
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
        strict_gain=interval("strict_gain_over_base"),
        flexible_gain=interval("flexible_gain_over_base"),
        method_gain=interval("gain_over_untouched_method"),
        tuned_gain=interval("gain_over_tuned_method"),
    )


def _interval(interval: Interval | None) -> dict[str, float] | None:
    """Return mean and 95% bounds."""
    if interval is None:
        return None
    return {"mean": interval.mean, "low": interval.low, "high": interval.high}
