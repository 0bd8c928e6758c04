"""Table of the controls: budget, cost, and accuracy of the best merge of each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sdjax.evaluation.statistics import Interval, accuracy_interval
from sdjax.search.budget import device_count, number_in, spent, spent_on_tuning
from sdjax.search.controls import control_budget, tuned_controls
from sdjax.search.entry_names import display_name
from sdjax.search.ranking import (
    complete_scores,
    final_ranking,
    purpose_samples,
    selection_order,
    tuned_from,
)
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, MAIN, RANDOM, SEARCH, TEST, UNTRAINED, Entry

TITLES: Mapping[str, str] = {
    SEARCH: "programs of the run",
    RANDOM: "random programs",
    UNTRAINED: "programs of the untrained generator",
}


@dataclass(frozen=True, kw_only=True)
class ControlRow:
    """Cost of a control, or of the search itself, and the accuracy of its best merge.

    Attributes:
        title: name of the control.
        entry: entry name of its best merge, by confirmation score if there is one; None if nothing
            was scored.
        numbers: number of tuned numbers of that merge.
        problems: development problems that were evaluated to find it.
        seconds: device-seconds that this took.
        note: how it was found, such as "the gradient; ended after 7 of 56 evaluations".
        accuracies: accuracy of the best merge by split, by the run's metric.
    """

    title: str
    entry: str | None
    numbers: int
    problems: int
    seconds: float
    note: str
    accuracies: Mapping[str, Interval]


def control_rows(store: Store, metric: str) -> tuple[ControlRow, ...]:
    """Return the rows of the search, of the control programs, of tuned controls and of grids."""
    purposes = [one for one in (SEARCH, RANDOM, UNTRAINED) if store.judged(purpose=one)]
    rows = [_program_row(store, metric, purpose) for purpose in purposes]
    entries = store.by_key(Entry)
    rows += [_tuned_row(store, metric, entries[name]) for name in tuned_controls(store)]
    return (*rows, *_grid_rows(store, metric, entries))


def _program_row(store: Store, metric: str, purpose: str) -> ControlRow:
    samples = purpose_samples(store, purpose)
    programs = {sample.identity for sample in samples} - {None}
    best = next(iter(final_ranking(store, metric, purpose)), None)
    scored, tuned = spent(store, purpose), spent_on_tuning(store, purpose)
    return ControlRow(
        title=TITLES[purpose],
        entry=None if best is None else best.name,
        numbers=0 if best is None else int(number_in(best.detail, "constants")),
        problems=scored.problems + tuned.problems,
        seconds=scored.seconds + tuned.seconds,
        note=f"{len(samples):,} samples, {len(programs):,} distinct programs"
        + ("" if best is None else f"; best: {display_name(best.name, tuned_from(best))}"),
        accuracies=_accuracies(store, metric, None if best is None else best.name),
    )


def _tuned_row(store: Store, metric: str, entry: Entry) -> ControlRow:
    detail = entry.detail
    used, allowed = int(number_in(detail, "evaluations")), control_budget(entry)
    ended = f"ended after {used}" if used < allowed else "used all"
    return ControlRow(
        title=display_name(entry.name),
        entry=entry.name,
        numbers=int(number_in(detail, "constants")),
        problems=int(number_in(detail, "problems")),
        seconds=number_in(detail, "seconds"),
        note=f"{detail.get('optimizer', '')}; {ended} of {allowed} evaluations",
        accuracies=_accuracies(store, metric, entry.name),
    )


def _grid_rows(store: Store, metric: str, entries: Mapping[str, Entry]) -> list[ControlRow]:
    """Return a row for the best point of each grid; a point on two grids counts for both."""
    scores = complete_scores(store, metric)
    points: dict[str, list[str]] = {}
    for name, entry in entries.items():
        if "method" in entry.detail and name in scores:
            grids = entry.detail.get("grids")
            for grid in grids if isinstance(grids, list) else ():
                points.setdefault(str(grid), []).append(name)
    answered = {one.entry: one.problems for one in store.summaries(DEVELOPMENT)}
    in_phase = {name for names in points.values() for name in names}
    in_phase |= {name for name in scores if entries[name].kind in ("seed", "expert")}
    seconds = store.phases().get((0, "baselines"), 0.0) * device_count(store)
    best = {grid: selection_order(store, metric, names)[0] for grid, names in points.items()}
    return [
        ControlRow(
            title=f"{grid} grid of methods",
            entry=best[grid],
            numbers=0,
            problems=sum(answered[name] for name in names),
            seconds=seconds * len(names) / len(in_phase),  # its share of the phase
            note=f"{len(names)} points; best: {display_name(best[grid])}",
            accuracies=_accuracies(store, metric, best[grid]),
        )
        for grid, names in points.items()
    ]


def _accuracies(store: Store, metric: str, entry: str | None) -> dict[str, Interval]:
    """Return the accuracy on each split whose evaluation is complete."""
    if entry is None:
        return {}
    return {
        one.split: accuracy_interval(
            [getattr(outcome, metric) for outcome in store.outcomes(entry, one.split)]
        )
        for one in store.summaries(None, MAIN)
        if one.entry == entry and one.complete
    }


def shown_splits(rows: Sequence[ControlRow]) -> list[str]:
    """Return the splits that some row has an accuracy on, in the order of the search."""
    found = dict.fromkeys(split for row in rows for split in row.accuracies)
    return sorted(found, key=lambda split: (split == TEST, split != DEVELOPMENT))
