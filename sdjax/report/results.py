"""Rows of the final tables: test results of the seed, the experts, the methods and the programs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from sdjax.evaluation.statistics import Interval, accuracy_interval, paired_by_key
from sdjax.search.answer import tested_entries
from sdjax.search.entry_names import display_name
from sdjax.search.ranking import (
    best_method,
    complete_scores,
    final_ranking,
    programs_of,
    rank_key,
    tuned_from,
)
from sdjax.search.store import Store
from sdjax.search.types import (
    CONFIRMATION,
    DEVELOPMENT,
    MAIN,
    RANDOM,
    SEARCH,
    TEST,
    UNTRAINED,
    Entry,
)

CONTROL = "control"  # kind of a program that a control has found, and the search has not
KINDS = ("seed", "expert", "method", CONTROL, "program")
METRICS = ("strict", "flexible")


@dataclass(frozen=True, kw_only=True)
class TestRow:
    """Test results of one entry; differences are paired by problem.

    Attributes:
        name: name of the entry.
        kind: kind of the entry, such as "method"; "control" for a program that is not the run's.
        purpose: what the program was sampled for, such as "random"; "search" for other entries.
        rank: for a program, its rank, starting at 1, as `sdjax merge --run --rank` takes it; see
            `sdjax.search.ranking.final_ranking`.
        development: score on the development problems with the search's experts; None if the entry
            has none.
        confirmation: score on the confirmation problems with the search's experts; None if the
            entry has none.
        problems: number of test problems.
        strict: accuracy by the strict filter.
        flexible: accuracy by the flexible filter.
        strict_gain: strict accuracy minus the seed's.
        flexible_gain: flexible accuracy minus the seed's.
        method_gain: for a program, accuracy by the run's metric minus that of the best
            human-designed method; see `sdjax.search.ranking.best_method`.
        tuned_from: for a program with tuned numbers, the identity of the program as it was written;
            empty for other entries.
        tuned_on: the experts that the hyperparameters of a method, or a program, were selected on;
            empty if all rows of a table have the same.
    """

    __test__ = False  # pytest would collect a class named Test…

    name: str
    kind: str
    purpose: str = SEARCH
    rank: int | None = None
    development: float | None
    confirmation: float | None = None
    problems: int
    strict: Interval
    flexible: Interval
    strict_gain: Interval | None
    flexible_gain: Interval | None
    method_gain: Interval | None
    tuned_from: str = ""
    tuned_on: str = ""

    @property
    def is_answer(self) -> bool:
        """Whether this is the run's best program, which its answer is about."""
        return self.rank == 1

    @property
    def title(self) -> str:
        """The readable name."""
        title = display_name(self.name, self.tuned_from)
        return title if self.purpose == SEARCH else f"{self.purpose} {title}"

    def accuracy(self, metric: str) -> Interval:
        """Return the accuracy by "strict" or "flexible"."""
        return self.flexible if metric == "flexible" else self.strict

    def gain(self, metric: str) -> Interval | None:
        """Return the accuracy minus the seed's by "strict" or "flexible"."""
        return self.flexible_gain if metric == "flexible" else self.strict_gain


def final_rows(store: Store, setting: str, metric: str) -> tuple[TestRow, ...]:
    """Return the final table: the seed, then experts, methods, controls and programs.

    Rows of one kind are ordered as in the selection, never by test score; that also holds in
    settings without development scores of their own, such as the transfer.
    """
    entries = store.by_key(Entry)
    development, confirmation = (
        {
            name: score
            for name, score in complete_scores(store, metric, split=split).items()
            if setting == MAIN or entries[name].kind != "expert"  # others are in the same slots
        }
        for split in (DEVELOPMENT, CONFIRMATION)
    )
    tested = tested_entries(store, setting)
    return result_rows(
        store,
        [one.entry for one in store.summaries(TEST, setting) if one.entry in tested],
        metric,
        setting=setting,
        development=development,
        confirmation=confirmation,
        ranks={entry.name: rank for rank, entry in enumerate(final_ranking(store, metric), 1)},
        method=best_method(store, metric),
    )


def result_rows(
    store: Store,
    names: Iterable[str],
    metric: str,
    *,
    setting: str = MAIN,
    development: Mapping[str, float],
    confirmation: Mapping[str, float] | None = None,
    ranks: Mapping[str, int],
    method: str | None,
    tuned_on: Mapping[str, str] | None = None,
) -> tuple[TestRow, ...]:
    """Return a table of the entries with a complete test score; see `final_rows` for its order.

    Args:
        store: the store of the results.
        names: names of the entries.
        metric: the run's metric.
        setting: name of the setting.
        development: development scores to show.
        confirmation: confirmation scores to show.
        ranks: ranks of the programs.
        method: the method that programs are compared with.
        tuned_on: `TestRow.tuned_on` of entries.
    """
    entries = store.by_key(Entry)
    complete = {one.entry for one in store.summaries(TEST, setting) if one.complete}
    outcomes = {name: store.outcomes(name, TEST, setting) for name in names if name in complete}
    seed = next((name for name in outcomes if entries[name].kind == "seed"), None)

    def gain(name: str, reference: str | None, answer_filter: str) -> Interval | None:
        if reference not in outcomes or name == reference:
            return None
        correct, reference_correct = (
            {outcome.problem_id: getattr(outcome, answer_filter) for outcome in outcomes[entry]}
            for entry in (name, reference)
        )
        if correct.keys() != reference_correct.keys():
            return None
        return paired_by_key(correct, reference_correct)

    controls = {name: one for one in (UNTRAINED, RANDOM) for name in programs_of(store, one)}
    own = programs_of(store, SEARCH)

    def row(name: str) -> TestRow:
        is_program = entries[name].kind == "program"
        is_control = is_program and name not in own
        return TestRow(
            name=name,
            kind=CONTROL if is_control else entries[name].kind,
            purpose=controls[name] if is_control else SEARCH,
            rank=ranks.get(name),
            development=development.get(name),
            confirmation=(confirmation or {}).get(name),
            problems=len(outcomes[name]),
            strict=accuracy_interval([o.strict for o in outcomes[name]]),
            flexible=accuracy_interval([o.flexible for o in outcomes[name]]),
            strict_gain=gain(name, seed, "strict"),
            flexible_gain=gain(name, seed, "flexible"),
            method_gain=gain(name, method, metric) if is_program else None,
            tuned_from=tuned_from(entries[name]),
            tuned_on=(tuned_on or {}).get(name, ""),
        )

    rows = [row(name) for name in outcomes]
    rows.sort(
        key=lambda r: (
            KINDS.index(r.kind),
            math.inf if r.rank is None else r.rank,
            -(r.confirmation or 0.0),
            rank_key(r.development or 0.0, r.name),
        )
    )
    return tuple(rows)


def shown_metrics(rows: Sequence[TestRow], metric: str) -> tuple[str, ...]:
    """Return the metrics to show: the run's metric alone if both are equal in every row."""
    equal = all(row.strict == row.flexible and row.strict_gain == row.flexible_gain for row in rows)
    return (metric,) if equal else METRICS


def cut_middle(text: str, length: int) -> str:
    """Return the text, with its middle replaced by an ellipsis if it is longer than `length`."""
    if len(text) <= length:
        return text
    end = (length - 1) // 2
    return f"{text[: length - 1 - end]}…{text[len(text) - end :]}"
