"""What the scoring of a purpose's programs has cost, so that controls get the same."""

from __future__ import annotations

from dataclasses import dataclass

from sdjax.search.ranking import programs_of, purpose_samples
from sdjax.search.store import Store
from sdjax.search.types import (
    DEVELOPMENT,
    SEARCH,
    UNTRAINED,
    Entry,
    StoredVerdict,
    phase_name,
    program_entry,
)

TUNING = "tuning"  # in an entry's details: problems and seconds of the search for its numbers


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Cost of the scores of the programs of a purpose.

    Attributes:
        problems: development problems that were answered, one for each candidate that answered it.
        seconds: duration of the phases that scored them, of which interrupted calls are no part.
    """

    problems: int
    seconds: float


def spent_on_tuning(store: Store, purpose: str = SEARCH) -> Spent:
    """Return what the tuning of a purpose's best programs, after their scores, has cost so far.

    Args:
        store: the run's store.
        purpose: "search" or that of a control.
    """
    entries = store.by_key(Entry)
    costs = [entries[name].detail.get(TUNING) or {} for name in programs_of(store, purpose)]
    return Spent(
        problems=sum(cost.get("problems", 0) for cost in costs),
        seconds=sum(cost.get("seconds", 0.0) for cost in costs),
    )


def spent(store: Store, purpose: str = SEARCH) -> Spent:
    """Return what the scores of a purpose's programs have cost so far.

    A program, or a structure, that several purposes share counts for each of them.

    Args:
        store: the run's store.
        purpose: "search", that of a control, or the name of a measurement.
    """
    structures = {one.identity: one.structure for one in store.select(StoredVerdict)}
    answered = {one.entry: one.problems for one in store.summaries(DEVELOPMENT)}
    tried = store.candidate_problems()
    samples = purpose_samples(store, purpose)
    identities = {sample.unconfirmed or sample.identity for sample in samples} - {None}
    tuned = {structures[identity] for identity in identities} & tried.keys()
    problems = sum(tried[structure] for structure in tuned if structure is not None)
    problems += sum(
        answered.get(program_entry(identity or ""), 0)
        for identity in identities
        if structures[identity] not in tuned
    )
    phases = store.phases()
    phase = phase_name("score", purpose)
    seconds = sum(time for (_, name), time in phases.items() if name == phase)
    if purpose == UNTRAINED:  # see `purpose_samples`
        seconds += phases.get((1, "score"), 0.0)
    return Spent(problems=problems, seconds=seconds)
