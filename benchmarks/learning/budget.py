"""What a search had found when its programs had evaluated a number of development problems.

Programs count in sampling order, each with the problems that its score has cost, so that searches
with different numbers of samples are compared at equal budgets.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np

from sdjax.search.base_identity import base_of_iteration, hash_on_base
from sdjax.search.score_types import Promotion
from sdjax.search.store import Store
from sdjax.search.structures import program_scores, scored_programs, structures_of
from sdjax.search.types import DEVELOPMENT, SEARCH, StoredVerdict, program_entry

TOP = 10
CURVE_POINTS = 60


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A sample of a search.

    Attributes:
        iteration: its iteration.
        structure: hash of its structure; None if it was refused.
        identity: identity of the program whose score it has; None for a sample without a score and
            for a duplicate.
        admissible: whether it is a usable program.
        novel: whether it is the first sample of its program.
        problems: development problems that its score has cost.
        score: development accuracy of a novel program, on the problems that it has answered.
        complete: whether it has answered all of them.
    """

    iteration: int
    structure: str | None = None
    identity: str | None = None
    admissible: bool = False
    novel: bool = False
    problems: int = 0
    score: float = 0.0
    complete: bool = False


def tried_samples(store: Store, metric: str) -> list[Tried]:
    """Return the samples of a search, in sampling order."""
    structures, best = structures_of(store), scored_programs(store)
    identities = {one.source: one.identity for one in store.select(StoredVerdict)}
    scores, candidates = program_scores(store, metric), store.candidate_problems()
    promotions = store.select(Promotion)
    summaries = {one.entry: one for one in store.summaries(DEVELOPMENT)}
    tried = []
    for sample in store.judged():
        own = identities.get(sample.source or "")
        if own is None or not sample.novel:
            # A program whose merge equals that of an earlier one has answered nothing.
            tried.append(Tried(iteration=sample.iteration, admissible=sample.admissible))
            continue
        own = hash_on_base(own, base_of_iteration(promotions, SEARCH, sample.iteration))
        found = summaries.get(program_entry(best.get(own, own)))
        cost = candidates.get(structures[own], 0 if found is None else found.problems)
        tried.append(
            Tried(
                iteration=sample.iteration,
                structure=structures[own],
                identity=best.get(own) if own in scores else None,
                admissible=True,
                novel=True,
                problems=cost,
                score=scores.get(own, 0.0),
                complete=found is not None and found.complete,
            )
        )
    return tried


def within(tried: Sequence[Tried], budget: int) -> list[Tried]:
    """Return the first samples, up to the program whose score exceeds a budget of problems."""
    spent = accumulate(one.problems for one in tried)
    return [one for one, problems in zip(tried, spent, strict=True) if problems <= budget]


def best_programs(tried: Sequence[Tried], count: int) -> list[Tried]:
    """Return the best programs of different structures that have answered all problems."""
    first: dict[str | None, Tried] = {}
    for one in _ranked(tried):
        if one.complete:
            first.setdefault(one.structure, one)
    return list(first.values())[:count]


def top_mean(tried: Sequence[Tried]) -> float:
    """Return the mean score of the ten best programs, those that answered all problems first."""
    scores = [one.score for one in _ranked(tried)[:TOP]]
    return float(np.mean(scores)) if scores else 0.0


def measures(tried: Sequence[Tried]) -> dict[str, float]:
    """Return what is measured of a search up to a budget, by name."""
    scored = [one for one in tried if one.identity is not None]
    distinct = {one.identity for one in scored}
    samples = max(1, len(tried))
    return {
        "samples": len(tried),
        "problems": sum(one.problems for one in tried),
        "best": max((one.score for one in scored if one.complete), default=0.0),
        "top mean": top_mean(tried),
        "distinct": len(distinct),
        "distinct share": len(distinct) / samples,
        "unique scores": len({round(one.score, 9) for one in scored}),
        "admissible share": sum(one.admissible for one in tried) / samples,
    }


def curve(tried: Sequence[Tried], budget: int) -> list[dict[str, float]]:
    """Return the best score and the mean of the ten best at equal steps of the budget."""
    points = []
    for number in range(1, CURVE_POINTS + 1):
        problems = budget * number // CURVE_POINTS
        found = measures(within(tried, problems))
        points.append({"problems": problems, "best": found["best"], "top mean": found["top mean"]})
    return points


def _ranked(tried: Sequence[Tried]) -> list[Tried]:
    scored = [one for one in tried if one.identity is not None]
    return sorted(scored, key=lambda one: (-one.complete, -one.score, one.identity))
