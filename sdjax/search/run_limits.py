"""Limits of a search: the programs that it may sample, and the hours that it may take.

A search that reaches a limit ends early. What it has found is then tuned, compared with controls
and tested as usual, which takes its own time, so that the run has its answer. The limit of programs
is exact: up to there, the run equals one without it. The limit of hours ends the search after the
sample or the answers in progress, wherever that is.

A search also ends early if its generators have nothing left to write, since the budget of each
endpoint and the programs of each folder are used up. The store then has an iteration that was
sampled without a result. A resumed run samples it again, so that more tokens or programs continue
the search there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from sdjax.core.progress import format_duration
from sdjax.search.config import RunConfig
from sdjax.search.store import Store

_SEARCH_PHASES = ("baselines", "generate", "admit", "score", "promote", "refine")


class OutOfTime(Exception):
    """The search has used the hours that it may take."""


class OutOfPrograms(Exception):
    """No generator has anything left to write."""


def never() -> bool:
    """Return False, as the check of an unlimited run."""
    return False


def end_if(out_of_time: Callable[[], bool]) -> None:
    """Raise OutOfTime if a limit is reached."""
    if out_of_time():
        raise OutOfTime


def complete_samples(store: Store) -> dict[int, int]:
    """Return the number of samples of each iteration whose samples are complete."""
    return {iteration: count for iteration, count in _sampled(store).items() if count}


def planned_samples(config: RunConfig, store: Store) -> tuple[int, ...]:
    """Return the number of samples of each iteration that the limit of programs leaves.

    An iteration whose samples are complete keeps their number, whatever the config is now.

    Args:
        config: the run's config.
        store: the run's store.
    """
    complete, limit = complete_samples(store), config.limits.max_programs
    planned: list[int] = []
    for iteration in range(1, config.iterations + 1):
        count = config.generation.samples
        if iteration in complete:
            count = complete[iteration]
        elif limit is not None:
            count = min(count, limit - sum(planned))
        if count < 1:
            break
        planned.append(count)
    return tuple(planned)


def is_trained(config: RunConfig, store: Store, iteration: int) -> bool:
    """Return whether the generator is trained after an iteration."""
    within = dataclasses.replace(config, iterations=max(1, len(planned_samples(config, store))))
    return iteration in within.trained_iterations


def search_seconds(store: Store) -> float:
    """Return the time that the search has taken so far, its baselines included."""
    times = (*store.phases().items(), *store.unfinished_phases().items())
    return sum(seconds for (_, name), seconds in times if name in _SEARCH_PHASES)


def end_reason(config: RunConfig, store: Store) -> str | None:
    """Return why the search of a run ended before its last iteration; None if it did not.

    Args:
        config: the run's config.
        store: the run's store, after the search.
    """
    limits, planned, phases = config.limits, planned_samples(config, store), store.phases()
    scored = sum((number, "score") in phases for number in range(1, len(planned) + 1))
    total = config.iterations * config.generation.samples
    sampled = _sampled(store)
    if any(sampled.get(number) == 0 for number in range(1, config.iterations + 1)):
        return (
            f"generators that have nothing left to write: {sum(sampled.values()):,} of {total:,} "
            "programs"
        )
    if scored < len(planned):
        if limits.max_hours is None or search_seconds(store) < 3600 * limits.max_hours:
            return None
        return (
            f"limits.max_hours = {limits.max_hours:g}: {scored} of {config.iterations} iterations "
            f"are complete after {format_duration(search_seconds(store))}"
        )
    if limits.max_programs is None or not limits.max_programs <= sum(planned) < total:
        return None
    return f"limits.max_programs = {limits.max_programs}: {sum(planned):,} of {total:,} programs"


def _sampled(store: Store) -> dict[int, int]:
    """Return the number of samples of each sampled iteration; 0 if there was nothing to write."""
    iterations = [iteration for iteration, name in store.phases() if name == "generate"]
    return {iteration: len(store.sample_numbers(iteration)) for iteration in iterations}
