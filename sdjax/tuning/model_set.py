"""The models that are merged while tuning: their names, and the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdjax.merging.scope import Scope, select_paths
from sdjax.models.tensor_names import TensorName, parse_name
from sdjax.tuning.types import Tunable


@dataclass(frozen=True, kw_only=True)
class ModelSet:
    """The models that a tunable merges.

    Attributes:
        base: name of the base model; None if the task vectors are the experts' own weights.
        experts: slot to name of the model, in order.
        paths: canonical paths of the base's floating-point tensors.
        scope: the tensors that are merged: "all", "mlp", "attention" or patterns.
        dtype: dtype in which the base is stored, such as "bfloat16"; None if it is not known.
    """

    base: str | None
    experts: Mapping[str, str]
    paths: tuple[str, ...]
    scope: Scope = "all"
    dtype: str | None = None

    @property
    def in_scope(self) -> tuple[str, ...]:
        """The paths of the tensors that are merged."""
        return select_paths(self.paths, self.scope)

    @property
    def num_layers(self) -> int:
        """The number of layers; 0 if no tensor is recognized as part of a layer."""
        layers = (parse_name(path).layer for path in self.paths)
        return max((layer + 1 for layer in layers if layer is not None), default=0)


@dataclass(frozen=True, kw_only=True)
class NamedMerge:
    """A merge that names its own models, such as a recipe.

    Attributes:
        base: name of the base model; None if nothing is subtracted from the experts.
        experts: slot to name of the model, in order.
        folder: folder that the names of models are relative to, before the working directory.
        open: returns what is tuned, given those models.
        tasks: names of the tasks that the file wants, if it names any; those of other tools that
            have a counterpart here are translated.
        notes: remarks for the user.
    """

    base: str | None
    experts: Mapping[str, str]
    folder: Path
    open: Callable[[ModelSet], Tunable]
    tasks: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def short_names(models: Sequence[str]) -> list[str]:
    """Return the last parts of the models' names if they are distinct, else the names."""
    short = [model.rstrip("/").rpartition("/")[2] for model in models]
    return short if len(set(short)) == len(short) else list(models)


def filter_of(place: TensorName) -> str:
    """Return the part of a tensor's name in a checkpoint that all layers share."""
    name = place.spellings[-1]
    if place.layer is None:
        return name
    return re.split(rf"[._]{place.layer}\.", f".{name}", maxsplit=1)[1]
