"""Ranking of entries, shared by the loop, the report and the commands.

Every ranking is by descending score, with ties broken by name. The name of a discovered program
ends with its identity, so ties between programs are broken by identity.

The search ranks by development score. After it, finalists and controls are scored on confirmation
problems, by which no number was tuned and nothing was selected, and these scores alone decide about
them (`selection_order`): a development score says the less the more was tuned on it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from sdjax.search.score_types import StoredOutcome, TestOpening
from sdjax.search.store import Store
from sdjax.search.structures import scored_programs
from sdjax.search.types import (
    CONFIRMATION,
    OWN_GENERATOR,
    RANDOM,
    SEARCH,
    UNTRAINED,
    Entry,
    JudgedSample,
    program_entry,
)


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
        split: "development", "confirmation" or "test".
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


def correct_answers(
    store: Store, split: str, metric: str, *, setting: str = "main"
) -> dict[str, dict[str, bool]]:
    """Return whether each answer is correct, by entry and problem, without reading the answers.

    Args:
        store: the run's store.
        split: "development", "confirmation" or "test".
        metric: "strict" or "flexible".
        setting: name of the setting in which the entries were scored.
    """
    columns = ("entry", "outcome_problem_id", f"outcome_{metric}")
    correct: dict[str, dict[str, bool]] = {}
    for entry, problem, value in store.values(
        StoredOutcome, *columns, split=split, setting=setting
    ):
        correct.setdefault(entry, {})[problem] = value
    return correct


def purpose_samples(store: Store, purpose: str) -> list[JudgedSample]:
    """Return the judged samples of a purpose, with those of the search that count for it."""
    earlier = first_samples(store) if purpose == UNTRAINED else []
    return earlier + store.judged(purpose=purpose)


def first_samples(store: Store) -> list[JudgedSample]:
    """Return the samples of the search's first iteration by its own generator, then untrained."""
    return [sample for sample in store.judged(1) if sample.generator == OWN_GENERATOR]


def programs_of(store: Store, purpose: str) -> frozenset[str]:
    """Return the entry names of the programs of a purpose, and of those tuned from them.

    A program that several purposes have sampled belongs to each of them. What only a measurement
    has sampled, or nothing, belongs to the search.

    Args:
        store: the run's store.
        purpose: "search", "random" or "untrained".
    """
    names = _descendants(store, _sampled(store, purpose))
    if purpose != SEARCH:
        return frozenset(names)
    every = {name for name, entry in store.by_key(Entry).items() if entry.kind == "program"}
    controls = _sampled(store, RANDOM) | _sampled(store, UNTRAINED)
    return frozenset(every - (_descendants(store, controls) - names))


def controls(store: Store) -> frozenset[str]:
    """Return the entry names of what programs must beat: methods, and programs of controls.

    A program that the search and a control have found is both.
    """
    names = {name for name, entry in store.by_key(Entry).items() if entry.kind == "method"}
    for purpose in (RANDOM, UNTRAINED):
        if store.judged(purpose=purpose):  # without it, the first iteration is the search's alone
            names |= programs_of(store, purpose)
    return frozenset(names)


def _sampled(store: Store, purpose: str) -> set[str]:
    samples = purpose_samples(store, purpose)
    found = {one.identity for one in samples if one.identity is not None}
    scored = scored_programs(store)
    return {program_entry(one) for one in found | {scored.get(one, one) for one in found}}


def _descendants(store: Store, names: set[str]) -> set[str]:
    """Return the programs and those that were tuned from them, in one or more steps."""
    found, origins = set(names), {}
    for name, entry in store.by_key(Entry).items():
        if "tuned_from" in entry.detail:
            origins[name] = program_entry(str(entry.detail["tuned_from"]))
    while more := {name for name, origin in origins.items() if origin in found} - found:
        found |= more
    return found


def ranked_programs(store: Store, metric: str, purpose: str = SEARCH) -> list[Entry]:
    """Return the programs of a purpose with a complete development score, best first."""
    scores = complete_scores(store, metric)
    entries, names = store.by_key(Entry), programs_of(store, purpose)
    return [entries[name] for name in ranked(scores) if name in names]


def selection_order(store: Store, metric: str, names: Iterable[str]) -> list[str]:
    """Return entries with a development score, best first: those with a confirmation score first.

    Entries with confirmation scores are ordered by these, ties by development score; the others
    follow by development score, and so do the programs in `set_aside`.

    Args:
        store: the run's store.
        metric: "strict" or "flexible".
        names: names of the entries.
    """
    development = complete_scores(store, metric)
    confirmation = complete_scores(store, metric, split=CONFIRMATION)
    for name in set_aside(store):
        confirmation.pop(name, None)

    def key(name: str) -> tuple[bool, float, float, str]:
        confirmed = confirmation.get(name)
        return (confirmed is None, -(confirmed or 0.0), *rank_key(development[name], name))

    return sorted((name for name in names if name in development), key=key)


def set_aside(store: Store, setting: str = "main") -> set[str]:
    """Return the names of programs that are confirmed and tested, but are not finalists.

    They were the best ones at some point of the search; see `winners_so_far`.

    Args:
        store: the run's store.
        setting: name of the setting in which they were tested.
    """
    openings = store.select(TestOpening, setting=setting)
    finalists = {name for one in openings for name in one.entries}
    return {name for one in openings for name in one.earlier_bests} - finalists


def final_ranking(store: Store, metric: str, purpose: str = SEARCH) -> list[Entry]:
    """Return the programs of a purpose in `selection_order`; the first one is its best."""
    programs = {entry.name: entry for entry in ranked_programs(store, metric, purpose)}
    return [programs[name] for name in selection_order(store, metric, programs)]


def finalists(store: Store, metric: str, count: int, purpose: str = SEARCH) -> list[Entry]:
    """Return the programs to confirm and to test.

    These are the best ones by development score, the best one as it was written, and the best one
    by confirmation score both as it was written and as it was tuned.

    Args:
        store: the run's store.
        metric: "strict" or "flexible".
        count: number of best programs, tuned ones included.
        purpose: whose programs.
    """
    ranking = ranked_programs(store, metric, purpose)
    written = next((one for one in ranking if not is_tuned(one)), None)
    forms = both_forms(store, metric, final_ranking(store, metric, purpose)[0]) if ranking else ()
    chosen = [one for one in (*ranking[:count], written, *forms) if one is not None]
    return list({one.name: one for one in chosen}.values())


def winners_so_far(store: Store, metric: str) -> dict[int, str]:
    """Return the best program among the first 1, 2, 4, ... and among all that the search scored.

    Programs count in the order in which their evaluation started. As in a race, those that have
    answered more of the development problems come first.

    Args:
        store: the run's store.
        metric: "strict" or "flexible".

    Returns:
        the entry names, by number of programs.
    """
    own = programs_of(store, SEARCH)
    tried = [one for one in store.summaries("development") if one.entry in own]
    counts = [2**power for power in range(len(tried).bit_length())]
    return {
        count: min(
            tried[:count],
            key=lambda one: (-one.problems, *rank_key(getattr(one, metric), one.entry)),
        ).entry
        for count in dict.fromkeys([*counts, len(tried)])
        if count
    }


def is_tuned(program: Entry) -> bool:
    """Return whether the numbers of a program are tuned ones, and not as they were written."""
    return bool(tuned_from(program))


def tuned_from(entry: Entry) -> str:
    """Return the identity of the program whose numbers an entry has tuned; empty for others."""
    origin = entry.detail.get("tuned_from", entry.identity)
    return "" if origin == entry.identity else str(origin)


def both_forms(store: Store, metric: str, program: Entry) -> tuple[Entry | None, Entry | None]:
    """Return a program as it was tuned and as it was written; None if there is no such form.

    Args:
        store: the run's store.
        metric: "strict" or "flexible".
        program: the program in either form. If it was tuned several times from the same numbers,
            and this is not one of the results, the best result counts.
    """
    entries = store.by_key(Entry)
    if is_tuned(program):
        return program, _as_written(entries, program)
    programs = [name for name, entry in entries.items() if entry.kind == "program"]
    for name in selection_order(store, metric, programs):
        entry = entries[name]
        if is_tuned(entry) and _as_written(entries, entry) == program:
            return entry, program
    return None, program


def _as_written(entries: Mapping[str, Entry], program: Entry) -> Entry | None:
    """Return the program that a tuned one comes from, in one or more steps; None without one."""
    steps = {program.name}
    while is_tuned(program):
        origin = entries.get(program_entry(str(program.detail["tuned_from"])))
        if origin is None or origin.name in steps:
            return None
        steps.add(origin.name)
        program = origin
    return program


def best_method(store: Store, metric: str) -> str | None:
    """Return the first human-designed method in `selection_order`; None if none is scored.

    This is the rule by which the answer of a run chooses among controls.
    """
    methods = [name for name, entry in store.by_key(Entry).items() if entry.kind == "method"]
    return next(iter(selection_order(store, metric, methods)), None)


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
