"""One search of the comparison: to its budget, and what it had found on the way."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.environment import describe_environment
from benchmarks.learning.arm_settings import Arm
from benchmarks.learning.budget import (
    Tried,
    best_programs,
    curve,
    measures,
    tried_samples,
    within,
)
from sdjax.evaluation.statistics import percent
from sdjax.io.orbax import GeneratorCheckpoints
from sdjax.sandbox.sandbox import Sandbox
from sdjax.search.answer import count_numbers
from sdjax.search.baselines import score_baselines
from sdjax.search.config import RunConfig
from sdjax.search.context import RunContext, ScoringContext, build_context
from sdjax.search.control_programs import save_random_programs
from sdjax.search.iteration_scores import score_programs
from sdjax.search.loop import GENERATORS_FOLDER, run_iteration
from sdjax.search.multihost import open_sandbox, open_store
from sdjax.search.phase_clock import PhaseClock
from sdjax.search.phases import judge
from sdjax.search.scoring import save_settings, score_program
from sdjax.search.store import Store
from sdjax.search.tune import CONTINUED_FROM, tune_programs
from sdjax.search.types import (
    CONFIRMATION,
    DEVELOPMENT,
    MAIN,
    SEARCH,
    TEST,
    TRANSFER,
    Entry,
    program_entry,
)

POINTS = 3  # at which the best programs are tuned and tested: a third of the budget, and so on

logger = logging.getLogger(__name__)


def run_arm(arm: Arm, config: RunConfig, folder: Path, budget: int) -> dict[str, Any]:
    """Run a search until its programs have evaluated a number of problems, and return its row.

    An interrupted search resumes, with the same result.

    Args:
        arm: the arm; the config has its settings.
        config: config of the search.
        folder: the run folder.
        budget: number of development problems.
    """
    context, metric = build_context(config), config.task.metric
    with open_store(context, folder) as store, open_sandbox(context) as sandbox:
        save_settings(context, store)
        clock = PhaseClock(context, store)
        with clock.timed(0, "baselines"):
            score_baselines(context, store)
        with GeneratorCheckpoints(folder / GENERATORS_FOLDER) as checkpoints:
            for iteration in range(1, config.iterations + 1):
                # An interrupted iteration does not count, so that a resumed search continues it.
                before = [t for t in tried_samples(store, metric) if t.iteration < iteration]
                if sum(one.problems for one in before) >= budget:
                    break
                if arm.random:
                    _random_iteration(context, store, sandbox, iteration, clock)
                else:
                    run_iteration(context, store, checkpoints, sandbox, iteration, clock)
                _log_iteration(tried_samples(store, metric), iteration)
        tried = tried_samples(store, metric)
        points = []
        for number in range(1, POINTS + 1):
            found = within(tried, budget * number // POINTS)
            best = _best(context, store, sandbox, found, transfer=number == POINTS)
            points.append(measures(found) | best)
        return {
            "environment": describe_environment(),
            "budget": budget,
            "settings": list(arm.settings),
            "seed score": _accuracy(store, "seed", DEVELOPMENT, metric),
            "seconds": {f"{name} {n}": round(t, 1) for (n, name), t in store.phases().items()},
            "points": points,
            "curve": curve(tried, budget),
        }


def answers(store: Store, entry: str, split: str, metric: str, setting: str = MAIN) -> str:
    """Return whether each problem of a split is solved, in the order of their ids, as "0" and "1".

    Args:
        store: a store in which the entry has a complete score.
        entry: name of the entry.
        split: such as "test".
        metric: "strict" or "flexible".
        setting: name of the setting.
    """
    outcomes = store.outcomes(entry, split, setting)
    return "".join(str(int(getattr(outcome, metric))) for outcome in outcomes)


def tested(context: ScoringContext, store: Store, entry: Entry) -> dict[str, Any]:
    """Return an entry's scores as a row has them.

    Args:
        context: the loaded models.
        store: a store in which the entry is scored on all three splits.
        entry: the entry.
    """
    metric = context.config.task.metric
    return {
        "entry": entry.name,
        "constants": count_numbers(store, entry),
        "development": _accuracy(store, entry.name, DEVELOPMENT, metric),
        "confirmation": _accuracy(store, entry.name, CONFIRMATION, metric),
        "test": answers(store, entry.name, TEST, metric),
    }


def _accuracy(store: Store, entry: str, split: str, metric: str) -> float | None:
    found = answers(store, entry, split, metric)
    return float(np.mean([digit == "1" for digit in found])) if found else None


def _random_iteration(
    context: RunContext, store: Store, sandbox: Sandbox | None, iteration: int, clock: PhaseClock
) -> None:
    """Judge and score as many random programs as an iteration samples."""
    count = context.config.generation.samples
    save_random_programs(
        context,
        store,
        purpose=SEARCH,
        iteration=iteration,
        earlier=count * (iteration - 1),
        count=count,
    )
    with clock.timed(iteration, "admit"):
        judge(context, store, sandbox, iteration=iteration)
    with clock.timed(iteration, "score"):
        score_programs(context, store, sandbox, iteration=iteration)


def _best(
    context: RunContext,
    store: Store,
    sandbox: Sandbox | None,
    tried: Sequence[Tried],
    *,
    transfer: bool,
) -> dict[str, Any]:
    """Return the scores of the best program as it was written, and of the best one with tuning.

    The best ones by development score are tuned. Confirmation scores choose among these, and
    nothing is chosen by test scores.
    """
    assert context.config.tuning is not None
    best = best_programs(tried, context.config.tuning.programs)
    identities = [one.identity for one in best if one.identity is not None]
    if not identities:
        return {}
    tune_programs(context, store, sandbox, identities)
    entries = store.by_key(Entry)
    origins = {one.detail.get(CONTINUED_FROM): one for one in entries.values()}
    programs = [entries[program_entry(one)] for one in identities]
    written = [entries[program_entry(o.detail.get("tuned_from", o.identity))] for o in programs]
    tuned = [origins.get(one.identity, one) for one in programs]
    for entry in (*written, *tuned):
        assert entry.identity is not None
        score_program(context, store, sandbox, entry.identity, CONFIRMATION)
    row: dict[str, Any] = {}
    for form, forms in (("written", written), ("tuned", tuned)):
        entry = max(forms, key=lambda one: _order(context, store, one.name))
        assert entry.identity is not None
        score_program(context, store, sandbox, entry.identity, TEST)
        row[form] = tested(context, store, entry)
        row[form]["source"] = store.program(entry.identity).source
        if transfer and TRANSFER in context.settings:
            score_program(context, store, sandbox, entry.identity, TEST, TRANSFER)
            metric = context.config.task.metric
            row[form]["transfer"] = answers(store, entry.name, TEST, metric, TRANSFER)
    return row


def _order(context: ScoringContext, store: Store, name: str) -> tuple[float, float]:
    metric = context.config.task.metric
    splits = (CONFIRMATION, DEVELOPMENT)
    confirmed, developed = (_accuracy(store, name, split, metric) or 0.0 for split in splits)
    return confirmed, developed


def _log_iteration(tried: Sequence[Tried], iteration: int) -> None:
    found: Mapping[str, float] = measures(tried)
    logger.info(
        "iteration %d: %d problems, %d samples, %d distinct, best %s%%, mean of the top ten %s%%",
        *(iteration, found["problems"], found["samples"], found["distinct"]),
        *(percent(found["best"]), percent(found["top mean"])),
    )
