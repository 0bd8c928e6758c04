"""Resolution of the argument of `sdjax tune`: a program, a recipe or a family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from sdjax.core.errors import UserError
from sdjax.core.yaml import YamlDocument
from sdjax.tuning.evolve import is_evolve_config, read_evolve_config
from sdjax.tuning.families import DEFAULT_METHOD, FAMILIES, family_tunable
from sdjax.tuning.model_set import ModelSet, NamedMerge
from sdjax.tuning.recipes import read_tunable_recipe
from sdjax.tuning.types import Tunable

OpenProgram = Callable[[Path], Tunable]
"""Has a program file judged by a sandbox; see `sdjax.tuning.programs.program_tunable`."""


def read_named_merge(what: str) -> NamedMerge | None:
    """Return a recipe or a configuration of mergekit-evolve, which name their models.

    Args:
        what: what the user wants to tune.

    Returns:
        None if it is not a YAML file.

    Raises:
        UserError: the file cannot be read, or cannot be tuned.
    """
    if not what.endswith((".yaml", ".yml")):
        return None
    path = Path(what)
    document = YamlDocument.read(path)
    if is_evolve_config(document):
        return read_evolve_config(document, path)
    return read_tunable_recipe(path)


def open_tunable(
    what: str, models: ModelSet, *, open_program: OpenProgram | None = None
) -> Tunable:
    """Return what is tuned.

    Args:
        what: a program (.py), a recipe or a configuration of mergekit-evolve (.yaml), FAMILY,
            METHOD or METHOD:FAMILY (see `sdjax.tuning.families`).
        models: the models to merge; those of `read_named_merge`, if the file names them.
        open_program: opens a program file.

    Raises:
        UserError: no such file, method or family, nothing to tune, or models that do not fit.
    """
    if what.endswith(".py"):
        if open_program is None:
            raise UserError(f"{what}: a program file is tuned by the command sdjax tune")
        return open_program(Path(what))
    if named := read_named_merge(what):
        return named.open(models)
    method, colon, family = what.partition(":")
    if not colon and method in FAMILIES:
        return family_tunable(DEFAULT_METHOD, method, models)
    return family_tunable(method, family if colon else "weights", models)
