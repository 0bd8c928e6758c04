"""Controls of a run: tuned human-designed merges, and programs that are not the run's.

A discovered program is worth something only if it beats what the same effort gives without it.
`sdjax.search.control_search` tunes the merges, and `sdjax.search.control_programs` tries the
programs, each with the budget of the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from sdjax.core.config import errors_at
from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.methods.registry import algorithm
from sdjax.models.params import param_specs
from sdjax.programs.grammar import MAX_SLOTS, MIN_SLOTS
from sdjax.search.budget import number_in
from sdjax.search.config import RunConfig
from sdjax.search.plan import ScoringPlan
from sdjax.search.store import Store
from sdjax.search.types import RANDOM, UNTRAINED, Entry
from sdjax.tuning.model_set import ModelSet
from sdjax.tuning.open_tunable import open_tunable
from sdjax.tuning.types import Tunable


def control_names(config: RunConfig) -> tuple[str, ...]:
    """Return the families and methods that a run tunes as controls."""
    return () if config.controls is None else config.controls.tuned


def open_control(plan: ScoringPlan, family: str) -> Tunable:
    """Return a control family over the models of the search.

    Args:
        plan: the run's plan.
        family: such as "weights" or "ties:layers"; see `sdjax.tuning.families`.

    Raises:
        UserError: no such family, or one that does not fit the models.
    """
    config = plan.config
    models = ModelSet(
        base=config.seed,
        experts={slot: expert.model for slot, expert in config.experts.items()},
        paths=tuple(param_specs(plan.model)),
        scope=plan.paths,
    )
    return open_tunable(family, models)


def method_algorithm(plan: ScoringPlan, detail: Mapping[str, Any]) -> Algorithm:
    """Return the algorithm of a grid point or of a tuned control.

    Args:
        plan: the run's plan.
        detail: details of its entry.
    """
    if "family" in detail:
        return open_control(plan, detail["family"]).bind(np.array(detail["values"]))
    return algorithm(detail["method"], **detail["hyperparameters"])


def program_controls(config: RunConfig) -> tuple[str, ...]:
    """Return the purposes of a run's control programs.

    Without training, the run's own programs are those of the untrained generator.
    """
    if config.controls is None:
        return ()
    trained = config.training.enabled and config.max_samples > config.generation.samples
    wanted = {
        RANDOM: config.controls.random,
        UNTRAINED: config.controls.untrained and trained,
    }
    return tuple(purpose for purpose, is_wanted in wanted.items() if is_wanted)


def samples_of_control(config: RunConfig, purpose: str) -> int:
    """Return the maximum number of samples of a control, in addition to those of the search."""
    first = 0 if purpose == RANDOM else config.generation.samples  # they are untrained
    return max(0, config.max_samples - first)


def check_controls(plan: ScoringPlan) -> None:
    """Raise UserError if a control of the config is unknown or does not fit the models."""
    config = plan.config
    for family in control_names(config):
        with errors_at(config, "controls.tuned"):
            open_control(plan, family)
    count = len(config.slots)
    if RANDOM in program_controls(config) and not MIN_SLOTS <= count <= MAX_SLOTS:
        with errors_at(config, "controls.random"):
            raise UserError(
                f"random programs merge {MIN_SLOTS} to {MAX_SLOTS} experts, and the run has "
                f"{count}; set controls.random to false"
            )


def tuned_controls(store: Store) -> list[str]:
    """Return the entry names of the controls that have been tuned, with the largest budgets.

    A run that was extended has tuned its controls again, with the budget that its programs had
    then.
    """
    entries = [entry for entry in store.by_key(Entry).values() if is_tuned_control(entry)]
    budgets: dict[str, int] = {}
    for entry in entries:
        family = entry.detail["family"]
        budgets[family] = max(budgets.get(family, 0), control_budget(entry))
    return [e.name for e in entries if control_budget(e) == budgets[e.detail["family"]]]


def is_tuned_control(entry: Entry) -> bool:
    """Return whether an entry is a control that was tuned with the models of its store."""
    family = entry.detail.get("family")
    return entry.kind == "method" and isinstance(family, str) and not is_untouched(entry)


def is_untouched(entry: Entry) -> bool:
    """Return whether an entry is a control that a transfer took from a run."""
    return bool(entry.detail.get("untouched"))


def control_budget(entry: Entry) -> int:
    """Return the number of evaluations that the search of a tuned control was allowed."""
    return int(number_in(entry.detail, "budget"))
