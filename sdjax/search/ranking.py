"""Ranking of entries, shared by the loop, the report and the commands.

Every ranking is by descending score, with ties broken by name. The name of a discovered program
ends with its identity, so ties between programs are broken by identity.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sdjax.search.store import Store
from sdjax.search.types import Entry


def rank_key(score: float, name: str) -> tuple[float, str]:
    """Return the sort key of an entry or program: descending score, then name."""
    return (-score, name)


def ranked(scores: Mapping[str, float]) -> list[str]:
    """Return the names in `scores`, best first."""
    return sorted(scores, key=lambda name: rank_key(scores[name], name))


def complete_scores(
    store: Store, metric: str, *, split: str = "development", setting: str = "main"
) -> dict[str, float]:
    """Return the accuracy of each entry whose evaluation is complete.

    Args:
        store: the run's store.
        metric: "strict" or "flexible".
        split: "development" or "test".
        setting: name of the setting in which the entries were scored.
    """
    return {
        summary.entry: getattr(summary, metric)
        for summary in store.summaries(split, setting)
        if summary.complete
    }


def development_scores(store: Store, metric: str) -> dict[str, float]:
    """Return the accuracy of each entry on the development problems that it has answered.

    Only a program that stopped early in a race, or that is being scored, has not answered all.

    Args:
        store: the run's store.
        metric: "strict" or "flexible".
    """
    return {summary.entry: getattr(summary, metric) for summary in store.summaries("development")}


def ranked_programs(store: Store, metric: str) -> list[Entry]:
    """Return the discovered programs with a complete development score, best first."""
    scores = complete_scores(store, metric)
    entries = store.by_key(Entry)
    return [entries[name] for name in ranked(scores) if entries[name].kind == "program"]


def finalists(store: Store, metric: str, count: int) -> list[Entry]:
    """Return the programs to test: the best ones, and the best as it was written.

    Args:
        store: the run's store.
        metric: "strict" or "flexible".
        count: number of best programs, tuned ones included.
    """
    programs = ranked_programs(store, metric)
    best = programs[:count]
    written = [program for program in programs if "tuned_from" not in program.detail]
    return best + [program for program in written[:1] if program not in best]


def best_method(store: Store, metric: str) -> str | None:
    """Return the human-designed method with the best development score; None if none is scored."""
    scores, entries = complete_scores(store, metric), store.by_key(Entry)
    return next((name for name in ranked(scores) if entries[name].kind == "method"), None)


def best_by_group(groups: Iterable[tuple[str, str]], scores: Mapping[str, float]) -> dict[str, str]:
    """Return the best entry of each group.

    Args:
        groups: (group, entry) pairs; entries without a score are ignored.
        scores: score by entry.
    """
    best: dict[str, str] = {}
    for group, name in groups:
        if name in scores:
            current = best.get(group, name)
            best[group] = min(current, name, key=lambda one: rank_key(scores[one], one))
    return best
