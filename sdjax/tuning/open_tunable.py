"""What `sdjax tune` tunes, by the name that the user gives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.tuning.families import DEFAULT_METHOD, FAMILIES, family_tunable
from sdjax.tuning.model_set import ModelSet
from sdjax.tuning.types import Tunable

OpenProgram = Callable[[Path], Tunable]
"""Has a program file judged by a sandbox; see `sdjax.tuning.programs.program_tunable`."""


def open_tunable(
    what: str, models: ModelSet, *, open_program: OpenProgram | None = None
) -> Tunable:
    """Return what is tuned.

    Args:
        what: a program file (.py), FAMILY, METHOD or METHOD:FAMILY (see `sdjax.tuning.families`).
        models: the models to merge.
        open_program: opens a program file.

    Raises:
        UserError: no such file, method or family, nothing to tune, or models that do not fit.
    """
    if what.endswith(".py"):
        if open_program is None:
            raise UserError(f"{what}: a program file is tuned by the command sdjax tune")
        return open_program(Path(what))
    method, colon, family = what.partition(":")
    if not colon and method in FAMILIES:
        return family_tunable(DEFAULT_METHOD, method, models)
    return family_tunable(method, family if colon else "weights", models)
