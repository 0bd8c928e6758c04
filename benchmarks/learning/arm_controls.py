"""The tuned merges that searches are compared with, on the experts and on the transfer experts.

They are tuned once per seed, with the budget of a search and of the tuning of its best programs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.environment import describe_environment
from benchmarks.learning.arm_search import tested
from sdjax.search.baselines import score_baseline
from sdjax.search.comparison_config import ControlsConfig
from sdjax.search.config import RunConfig
from sdjax.search.context import build_context
from sdjax.search.control_search import tune_controls
from sdjax.search.controls import tuned_controls
from sdjax.search.multihost import open_store
from sdjax.search.scoring import save_settings
from sdjax.search.types import CONFIRMATION, DEVELOPMENT, TEST, Entry


def run_controls(
    config: RunConfig, folder: Path, budget: int, families: Sequence[str]
) -> dict[str, Any]:
    """Tune merges with the experts and with those of the transfer, and return their row.

    Args:
        config: config of the searches.
        folder: folder of the results, in which an interrupted call resumes.
        budget: budget of a search, in development problems.
        families: families of merges with the experts; with those of the transfer, it is one weight
            per expert, which is task arithmetic.
    """
    row: dict[str, Any] = {"environment": describe_environment(), "budget": budget}
    row["entries"] = _tune(config, folder / "experts", budget, families)
    if config.transfer:
        other = dataclasses.replace(config, experts=config.transfer)
        row["transfer"] = _tune(other, folder / "transfer", budget, ("weights",))
    return row


def _tune(
    config: RunConfig, folder: Path, budget: int, families: Sequence[str]
) -> list[dict[str, Any]]:
    """Return the scores of the seed and of merges that are tuned with a config's experts."""
    assert config.tuning is not None
    controls = ControlsConfig(tuned=tuple(families), random=False, untrained=False)
    context = build_context(dataclasses.replace(config, transfer={}, controls=controls))
    with open_store(context, folder) as store:
        save_settings(context, store)
        search = config.tuning.search
        evaluations = budget // len(context.problems[DEVELOPMENT])
        evaluations += config.tuning.programs * search.budget
        store.save(Entry(name="seed", kind="seed"))
        tune_controls(
            context, store, dataclasses.replace(search, budget=max(1, evaluations), starts=1)
        )
        entries, rows = store.by_key(Entry), []
        for name in ("seed", *tuned_controls(store)):
            for split in (DEVELOPMENT, CONFIRMATION, TEST):
                score_baseline(context, store, name, entries[name].detail or None, split)
            details = {key: entries[name].detail.get(key) for key in ("family", "evaluations")}
            rows.append(tested(context, store, entries[name]) | details)
        return rows
