"""Structures: programs without the numbers that can be tuned, and what they reached.

In a run with `score: tuned`, all samples of one structure have one score, that of the program with
the best numbers. Otherwise every program has its own.
"""

from __future__ import annotations

from sdjax.search.base_identity import hash_on_base
from sdjax.search.score_types import Promotion, ScoredStructure
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT, Program, StoredVerdict, program_entry


def structures_of(store: Store) -> dict[str, str]:
    """Return the structure of each admissible program, by identity.

    Programs on different bases have different structures; see `sdjax.search.base_identity`.
    """
    columns = ("source", "identity", "structure")
    structures: dict[str, str] = {}
    by_source: dict[str, str] = {}
    for source, identity, structure in store.values(StoredVerdict, *columns):
        if identity is not None:
            structures[identity] = by_source[source] = structure or identity
    if store.select(Promotion):
        for identity, source, base in store.values(Program, "identity", "source", "base"):
            if base is not None and source in by_source:
                structures[identity] = hash_on_base(by_source[source], base)
    return structures


def scored_programs(store: Store) -> dict[str, str]:
    """Return the identity of the program whose score a program has, by identity.

    With `score: as_written`, it is the program itself. Programs whose structure has no score yet
    are left out.
    """
    structures = structures_of(store)
    if not store.scores_structures():
        return {identity: identity for identity in structures}
    scored = store.by_key(ScoredStructure)
    return {
        identity: scored[structure].best
        for identity, structure in structures.items()
        if structure in scored
    }


def program_scores(store: Store, metric: str) -> dict[str, float]:
    """Return the development score of each program, or of its structure, by identity.

    Args:
        store: the run's store.
        metric: "strict" or "flexible".
    """
    scores = {one.entry: getattr(one, metric) for one in store.summaries(DEVELOPMENT)}
    return {
        identity: scores[program_entry(best)]
        for identity, best in scored_programs(store).items()
        if program_entry(best) in scores
    }
