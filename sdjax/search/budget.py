"""What the scoring of a purpose's programs has cost, so that controls get the same."""

from __future__ import annotations

from dataclasses import dataclass

from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, SEARCH, StoredVerdict, program_entry


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Cost of the scores of the programs of a purpose.

    Attributes:
        problems: development problems that were answered, one for each candidate that answered it.
        seconds: duration of the phases that scored them, of which interrupted calls are no part.
    """

    problems: int
    seconds: float


def score_phase(purpose: str = SEARCH) -> str:
    """Return the name of the phase that scores the programs of a purpose."""
    return "score" if purpose == SEARCH else f"score {purpose}"


def spent(store: Store, purpose: str = SEARCH) -> Spent:
    """Return what the scores of a purpose's programs have cost so far.

    A program, or a structure, that several purposes share counts for each of them.

    Args:
        store: the run's store.
        purpose: "search", or the name of a measurement.
    """
    structures = {one.identity: one.structure for one in store.select(StoredVerdict)}
    answered = {one.entry: one.problems for one in store.summaries(DEVELOPMENT)}
    tried = store.candidate_problems()
    samples = store.judged(purpose=purpose)
    identities = {sample.unconfirmed or sample.identity for sample in samples} - {None}
    tuned = {structures[identity] for identity in identities} & tried.keys()
    problems = sum(tried[structure] for structure in tuned if structure is not None)
    problems += sum(
        answered.get(program_entry(identity or ""), 0)
        for identity in identities
        if structures[identity] not in tuned
    )
    phase = score_phase(purpose)
    seconds = sum(time for (_, name), time in store.phases().items() if name == phase)
    return Spent(problems=problems, seconds=seconds)
