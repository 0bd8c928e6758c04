"""The answer of a run: was anything discovered that a human-designed or random merge does not give?

Each finalist that the search discovered is compared, on the test problems, with the best control
that has at most as many numbers; controls are tuned and found with the run's own budget. The best
control, and the program that the answer is about, are those with the best confirmation score
(`sdjax.search.ranking.selection_order`), so that the test problems select nothing.

The comparisons are paired by problem. There is one per finalist, tuned programs and programs as
they were written alike, and "discovered" is said of the best one only. Since the others are in the
report too, Holm's procedure (1979) corrects for all of them: the interval of a comparison has the
confidence level at which the procedure decides on it, so it excludes zero if and only if the
procedure rejects "no difference". These intervals are made for that decision; they do not all
cover their differences at the same time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sdjax.core.errors import UserError
from sdjax.evaluation.statistics import holm_levels, paired_difference, paired_p_value
from sdjax.programs.constants import find_constants
from sdjax.search.base_chains import chain_of_entry
from sdjax.search.budget import number_in
from sdjax.search.entry_names import display_name, short_identity
from sdjax.search.ranking import (
    both_forms,
    controls,
    final_ranking,
    is_tuned,
    programs_of,
    selection_order,
    set_aside,
    tuned_from,
)
from sdjax.search.score_types import Answer, Comparison, TestOpening
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
    Setting,
)

_LEVEL = 0.05


def save_answer(store: Store, metric: str) -> None:
    """Compare the finalists of a run with the controls, and save the answer.

    Args:
        store: the run's store.
        metric: the run's metric, "strict" or "flexible".
    """
    answer, comparisons = compute_answer(store, metric)
    if answer is not None:
        store.save(*comparisons, answer)


def read_answer(store: Store, metric: str) -> tuple[Answer | None, tuple[Comparison, ...]]:
    """Return the newest answer of a run and its comparisons, best program first.

    They are computed if the store has none: the run is unfinished, or one of an earlier version.

    Args:
        store: the run's store.
        metric: the run's metric.
    """
    answers = store.select(Answer)
    if not answers:
        return compute_answer(store, metric)
    stored = {one.program: one for one in store.select(Comparison, opening=answers[-1].opening)}
    order = [entry.name for entry in final_ranking(store, metric)]
    order += [name for name in stored if name not in order]
    return answers[-1], tuple(stored[name] for name in order if name in stored)


def compute_answer(store: Store, metric: str) -> tuple[Answer | None, tuple[Comparison, ...]]:
    """Return the answer and the comparisons of all finalists that have been tested.

    Args:
        store: the run's store.
        metric: the run's metric.

    Returns:
        no answer if the best program, or every control for it, lacks a test score.
    """
    tested = tested_entries(store, MAIN)
    ranking = final_ranking(store, metric)
    if not ranking:
        return None, ()
    against = _controls(store, metric, tested)
    forms = [form for form in both_forms(store, metric, ranking[0]) if form is not None]
    programs = {entry.name: entry for entry in [*ranking, *forms] if entry.name in tested}
    comparisons = _compare(store, metric, list(programs.values()), against)
    if ranking[0].name not in comparisons:
        return None, ()
    both = dict(zip(("as tuned", "as written"), both_forms(store, metric, ranking[0]), strict=True))
    chosen = [
        (form, comparisons[entry.name])
        for form, entry in both.items()
        if entry is not None and entry.name in comparisons
    ]
    chosen.sort(key=lambda one: one[1].program != ranking[0].name)  # the form that is ranked first
    names = {form: one.program for form, one in chosen}
    answer = Answer(
        opening=openings(store),
        sentence=_sentence(store, ranking[0], chosen, len(comparisons)),
        is_discovery=any(one.is_discovery for _, one in chosen),
        tuned=names.get("as tuned"),
        written=names.get("as written"),
        selected_by=CONFIRMATION if store.summaries(CONFIRMATION) else DEVELOPMENT,
    )
    return answer, tuple(comparisons.values())


def tested_entries(store: Store, setting: str) -> set[str]:
    """Return the names of the entries with a complete test score, but those in `set_aside`."""
    tested = {one.entry for one in store.summaries(TEST, setting) if one.complete}
    return tested - set_aside(store, setting)


def openings(store: Store) -> int:
    """Return how many times the test was opened with the models of the search, at least 1."""
    return max([1, *(one.number for one in store.select(TestOpening, setting=MAIN))])


def _controls(store: Store, metric: str, tested: set[str]) -> list[Entry]:
    """Return the tested controls, best first."""
    entries = store.by_key(Entry)
    return [entries[name] for name in selection_order(store, metric, controls(store) & tested)]


def _compare(
    store: Store, metric: str, programs: Sequence[Entry], controls: Sequence[Entry]
) -> dict[str, Comparison]:
    """Return the comparison of each program that a control matches, by name of its entry."""
    counts = {one.name: count_numbers(store, one) for one in (*programs, *controls)}
    matched = [
        (program, control)
        for program in programs
        if (control := next((c for c in controls if counts[c.name] <= counts[program.name]), None))
    ]
    pairs = [
        _paired(_correct(store, program.name, metric), _correct(store, control.name, metric))
        for program, control in matched
    ]
    p_values = [paired_p_value(*pair) for pair in pairs]
    comparisons = {}
    for (program, control), pair, p_value, level in zip(
        matched, pairs, p_values, holm_levels(p_values, _LEVEL), strict=True
    ):
        gain = paired_difference(*pair, 1 - level)
        comparisons[program.name] = Comparison(
            opening=openings(store),
            program=program.name,
            program_numbers=counts[program.name],
            control=control.name,
            control_numbers=counts[control.name],
            problems=len(pair[0]),
            gain=gain.mean,
            low=max(gain.low, -1.0),  # the interval of one problem is infinite
            high=min(gain.high, 1.0),
            p_value=p_value,
            confidence=1 - level,
        )
    return comparisons


def count_numbers(store: Store, entry: Entry) -> int:
    """Return how many numbers of an entry could be tuned, with those of its base.

    When a program is selected among many by its score, so are its constants, just as a grid selects
    hyperparameters. So both count, although no optimizer tuned them.
    """
    return sum(_own_numbers(store, one) for one in chain_of_entry(store, entry))


def _own_numbers(store: Store, entry: Entry) -> int:
    if "constants" in entry.detail:
        return int(number_in(entry.detail, "constants"))
    if entry.kind == "program":
        return _constants(store, entry)
    hyperparameters = entry.detail.get("hyperparameters")
    values = hyperparameters.values() if isinstance(hyperparameters, Mapping) else ()
    return sum(type(value) in (int, float) for value in values)


def _constants(store: Store, program: Entry) -> int:
    """Return the number of constants of a program that can be tuned."""
    slots = store.by_key(Setting)[MAIN].slots
    try:
        return len(find_constants(store.program(program.identity or "").source, tuple(slots)))
    except UserError:  # the store of an earlier version, or of a stranger
        return 0


def _correct(store: Store, entry: str, metric: str) -> dict[str, float]:
    outcomes = store.outcomes(entry, TEST, MAIN)
    return {outcome.problem_id: float(getattr(outcome, metric)) for outcome in outcomes}


def _paired(a: Mapping[str, float], b: Mapping[str, float]) -> tuple[list[float], list[float]]:
    common = [key for key in a if key in b]
    return [a[key] for key in common], [b[key] for key in common]


def _sentence(
    store: Store, best: Entry, chosen: Sequence[tuple[str, Comparison]], count: int
) -> str:
    """Return the answer about a program, whose own form is the first of those that are compared."""
    found = [form for form, one in chosen if one.is_discovery]
    verdict = "Nothing discovered" if not found else "Discovered"
    if found and len(chosen) > len(found):
        verdict += f" {found[0]} only"
    parts = [
        f"{form}{_how_many(one.program_numbers)} minus {control_title(store, one.control)}"
        f"{_how_many(one.control_numbers)} {one.interval.in_percent(signed=True)}"
        for form, one in chosen
    ]
    problems = chosen[0][1].problems
    correction = f", by Holm's procedure for {count} finalists" if count > 1 else ""
    opened = openings(store)
    again = f"; the test was opened {opened} times" if opened > 1 else ""
    return (
        f"{verdict}: the best program, {_both_names(best, chosen)} {', '.join(parts)} "
        f"points on {problems:,} test problems (against the best control with at most as many "
        f"numbers; 95 % intervals, paired by problem{correction}{again})"
    )


def _both_names(best: Entry, chosen: Sequence[tuple[str, Comparison]]) -> str:
    """Return the name of a program, with that of its other form if there is one."""
    name = display_name(best.name)
    if is_tuned(best):
        return f"{name}, tuned from {short_identity(tuned_from(best))}:"
    others = [one.program for _, one in chosen if one.program != best.name]
    if others:
        return f"{name}, tuned to {display_name(others[0])}:"
    return f"{name},"


def control_title(store: Store, control: str) -> str:
    """Return the readable name of a control, with the purpose of a control program."""
    title = display_name(control, tuned_from(store.by_key(Entry)[control]))
    if control not in programs_of(store, SEARCH):
        for purpose in (RANDOM, UNTRAINED):
            if control in programs_of(store, purpose):
                return f"{purpose} {title}"
    return title


def _how_many(count: int) -> str:
    return f" ({count} number{'s' * (count > 1)})" if count else ""
