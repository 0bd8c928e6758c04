"""The models that are merged while tuning: their names, and the names of their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from sdjax.merging.scope import Scope, select_paths
from sdjax.models.tensor_names import TensorName, parse_name


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


def filter_of(place: TensorName) -> str:
    """Return the part of a tensor's name in a checkpoint that all layers share."""
    name = place.spellings[-1]
    if place.layer is None:
        return name
    return re.split(rf"[._]{place.layer}\.", f".{name}", maxsplit=1)[1]
