"""Co-evolution of a run for the report: its bases and generators, and the tests that chose them."""

from __future__ import annotations

from dataclasses import dataclass

from sdjax.evaluation.statistics import percent
from sdjax.search.base_identity import base_of_iteration
from sdjax.search.baselines import SEED
from sdjax.search.entry_names import display_name
from sdjax.search.score_types import Promotion
from sdjax.search.store import Store
from sdjax.search.types import PURPOSES, SEARCH, Lineage


@dataclass(frozen=True, kw_only=True)
class PromotionRow:
    """A decision whether a merged model is promoted.

    Attributes:
        purpose: "search", that of a control, or what a tuned control is.
        iteration: iteration, batch or step after which it was decided.
        base: readable name of the base so far.
        candidate: readable name of what was compared with it; empty if nothing was.
        gain: difference from the base in points, with its interval.
        confidence: confidence level of the interval in percent.
        admissible: shares of admissible samples in percent, before and as the new generator.
        decision: what the candidate became.
    """

    purpose: str
    iteration: int
    base: str
    candidate: str
    gain: str
    confidence: str
    admissible: str
    decision: str


def promotion_rows(store: Store) -> tuple[PromotionRow, ...]:
    """Return the decisions of a run, those of the search first; empty without co-evolution."""
    promotions = store.select(Promotion)
    own = [one for one in promotions if one.purpose == SEARCH]
    others = [one for one in promotions if one.purpose != SEARCH]
    return tuple(map(_row, (*own, *others)))


def base_chains(store: Store) -> tuple[str, ...]:
    """Return the bases of each purpose in one line, such as "search: seed → program 3fa9c1d0".

    Purposes that kept the seed are left out.
    """
    promotions = store.select(Promotion)
    lines = []
    for purpose in PURPOSES:
        bases = [one.entry for one in promotions if one.purpose == purpose and one.is_base]
        if bases:
            titles = [SEED, *(display_name(name or SEED) for name in bases)]
            lines.append(f"{purpose}: {' → '.join(titles)}")
    return tuple(lines)


def iteration_bases(store: Store) -> dict[int, str]:
    """Return the readable name of the base of each iteration of the search."""
    promotions = store.select(Promotion)
    iterations = [one.iteration for one in store.select(Lineage)]
    bases = {n: base_of_iteration(promotions, SEARCH, n) for n in iterations}
    return {number: display_name(base or SEED) for number, base in bases.items()}


def _row(promotion: Promotion) -> PromotionRow:
    roles = {"base": promotion.is_base, "generator": promotion.is_generator}
    decision = " and ".join(f"next {role}" for role, is_role in roles.items() if is_role)
    tested = promotion.entry is not None
    shares = ""
    if promotion.admissible is not None:
        shares = f"{percent(promotion.admissible_before)} → {percent(promotion.admissible)}"
    return PromotionRow(
        purpose=promotion.purpose,
        iteration=promotion.iteration,
        base=display_name(promotion.base or SEED),
        candidate="" if promotion.entry is None else display_name(promotion.entry),
        gain=promotion.interval.in_percent(signed=True) if tested else "",
        confidence=percent(promotion.confidence) if tested else "",
        admissible=shares,
        decision=decision or ("kept" if tested else "nothing better to compare"),
    )
