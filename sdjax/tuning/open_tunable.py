"""What `sdjax tune` tunes, by the name that the user gives."""

from __future__ import annotations

from sdjax.tuning.families import DEFAULT_METHOD, FAMILIES, family_tunable
from sdjax.tuning.model_set import ModelSet
from sdjax.tuning.types import Tunable


def open_tunable(what: str, models: ModelSet) -> Tunable:
    """Return what is tuned.

    Args:
        what: FAMILY, METHOD or METHOD:FAMILY (see `sdjax.tuning.families`).
        models: the models to merge.

    Raises:
        UserError: no such method or family, nothing to tune, or models that do not fit.
    """
    method, colon, family = what.partition(":")
    if not colon and method in FAMILIES:
        return family_tunable(DEFAULT_METHOD, method, models)
    return family_tunable(method, family if colon else "weights", models)
