"""Cost of scoring the programs of a purpose, which is the budget of the controls."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sdjax.search.config import RunConfig
from sdjax.search.ranking import programs_of, purpose_samples
from sdjax.search.store import Store
from sdjax.search.structures import structures_of
from sdjax.search.types import (
    DEVELOPMENT,
    SEARCH,
    UNTRAINED,
    Entry,
    phase_name,
    program_entry,
)

_PHASES = ("generate", "admit", "score", "promote", "refine")
TUNING = "tuning"  # in an entry's details: what the search for its numbers cost


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Cost of the scores of the programs of a purpose.

    Attributes:
        problems: development problems that were answered, one for each candidate that answered it.
        seconds: device-seconds: duration of the phases that sampled, judged and scored the programs
            and trained their generator, times the number of devices. Interrupted calls are not
            included.
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
    names = programs_of(store, purpose)
    details = [entries[name].detail.get(TUNING) for name in names if name in entries]
    costs: list[Mapping[str, Any]] = [cost for cost in details if isinstance(cost, dict)]
    return Spent(
        problems=int(sum(number_in(cost, "problems") for cost in costs)),
        seconds=sum(number_in(cost, "seconds") for cost in costs),
    )


def number_in(detail: Mapping[str, Any], key: str) -> float:
    """Return a number of an entry's details; 0 if it is missing or not a finite number."""
    value = detail.get(key)
    return value if isinstance(value, int | float) and math.isfinite(value) else 0


def spent(store: Store, purpose: str = SEARCH) -> Spent:
    """Return what the scores of a purpose's programs have cost so far.

    A program, or a structure, that several purposes share counts for each of them.

    Args:
        store: the run's store.
        purpose: "search", that of a control, or the name of a measurement.
    """
    structures = structures_of(store)
    answered = {one.entry: one.problems for one in store.summaries(DEVELOPMENT)}
    tried = store.candidate_problems()
    samples = purpose_samples(store, purpose)
    identities = {sample.unconfirmed or sample.identity for sample in samples} - {None}
    tuned = {structures.get(identity or "") for identity in identities} & tried.keys()
    problems = sum(tried[structure] for structure in tuned if structure is not None)
    problems += sum(
        answered.get(program_entry(identity or ""), 0)
        for identity in identities
        if structures.get(identity or "") not in tuned
    )
    phases = store.phases()
    names = {phase_name(name, purpose) for name in _PHASES}
    seconds = sum(time for (_, name), time in phases.items() if name in names)
    if purpose == UNTRAINED:  # see `purpose_samples`
        seconds += sum(phases.get((1, name), 0.0) for name in _PHASES if name != "refine")
    return Spent(problems=problems, seconds=seconds * device_count(store))


def most_problems(config: RunConfig, problems: int) -> int:
    """Return how many development problems the score of one program may cost at most.

    With `score: tuned`, further numbers are tried before each rung; see `structure_search.py`.

    Args:
        config: config of a run.
        problems: its number of development problems.
    """
    if config.score == "as_written" or config.tuning is None:
        return problems
    settings = config.tuning.structures
    rungs = (problems,) if config.race is None else config.race.rungs(problems)
    searched = sum(rungs[: settings.rungs])
    return problems + (int(settings.steps > 0) + settings.candidates) * searched


def device_count(store: Store) -> int:
    """Return the number of devices of a run; 1 if it is not recorded."""
    count = store.run().versions.get("devices", "").partition(" ")[0]
    return int(count) if count.isdecimal() and count != "0" else 1
