"""Controls for discovered programs: families of human-designed merges, tuned by the run."""

from __future__ import annotations

from sdjax.core.config import errors_at
from sdjax.models.params import param_specs
from sdjax.search.plan import ScoringPlan
from sdjax.search.store import Store
from sdjax.search.types import Entry
from sdjax.tuning.model_set import ModelSet
from sdjax.tuning.open_tunable import open_tunable
from sdjax.tuning.types import Tunable


def control_entry(family: str) -> str:
    """Return the entry name of a tuned control."""
    return f"method:{family}, tuned"


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


def check_controls(plan: ScoringPlan) -> None:
    """Raise UserError if a control of the config is unknown or does not fit the models."""
    if plan.config.tuning is not None:
        for family in plan.config.tuning.controls:
            with errors_at(plan.config, "tuning.controls"):
                open_control(plan, family)


def tuned_controls(store: Store) -> list[str]:
    """Return the entry names of the controls that have been tuned."""
    return [name for name, entry in store.by_key(Entry).items() if "family" in entry.detail]
