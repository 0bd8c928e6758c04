"""Hyperparameters that differ between tensors: values along the layers, and by kind of tensor.

The rules are those of a recipe (`sdjax.merging.recipe.parameters`): a list of values is
interpolated along the layers, and the first entry whose filter is part of the tensor's name
applies. Tensors outside the layers have the first value of a list.

A schedule is resolved on the host, tensor by tensor, before tracing, and the values are ordinary
hyperparameters of an executable. It therefore compiles nothing, and its values may be traced.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from sdjax.core.errors import UserError


@jax.tree_util.register_pytree_node_class
@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Values of one hyperparameter, of one expert if it has a value per expert.

    Attributes:
        values: for each entry, its values along the layers: numbers, or traced scalars.
        filters: for each entry, the text that must be part of a tensor's name in a checkpoint; None
            for all tensors.
        step: whether a tensor has the value closest to its layer, instead of an interpolated one.
        last: names of tensors outside the layers that have the last value of a list.
    """

    values: tuple[tuple[Any, ...], ...]
    filters: tuple[str | None, ...] = (None,)
    step: bool = False
    last: frozenset[str] = frozenset()

    def at(self, name: str, depth: float) -> Any:
        """Return the value for one tensor.

        Args:
            name: the tensor's name in a checkpoint.
            depth: relative depth of its layer in [0, 1]; below 0 outside the layers.

        Raises:
            UserError: no entry matches the tensor.
        """
        position = 1.0 if depth < 0 and name in self.last else max(depth, 0.0)
        for pattern, values in zip(self.filters, self.values, strict=True):
            if pattern is not None and pattern not in name:
                continue
            if self.step:
                return values[round(position * (len(values) - 1))]
            return interpolate(values, position)
        raise UserError(f"no value for the tensor {name}; add an entry without a filter")

    def tree_flatten(self) -> tuple[tuple[Any, ...], Any]:
        """Return the values, and everything else."""
        return (self.values,), (self.filters, self.step, self.last)

    @classmethod
    def tree_unflatten(cls, auxiliary: Any, children: tuple[Any, ...]) -> Schedule:
        """Build a schedule from the result of `tree_flatten`."""
        filters, step, last = auxiliary
        return cls(values=children[0], filters=filters, step=step, last=last)


def interpolate(values: Sequence[Any], position: float) -> Any:
    """Return the value at a position in [0, 1] of numbers that are evenly spaced along it."""
    scaled = position * (len(values) - 1)
    first = int(scaled)
    second = min(len(values) - 1, first + 1)
    fraction = scaled - first
    return (1 - fraction) * values[first] + fraction * values[second]


def has_schedules(hyperparameters: Mapping[str, Any]) -> bool:
    """Return whether some hyperparameter, or its value for an expert, is a schedule."""
    leaves = jax.tree.leaves(dict(hyperparameters), is_leaf=_is_schedule)
    return any(map(_is_schedule, leaves))


def resolve_schedules(
    hyperparameters: Mapping[str, Any], name: str, depth: float
) -> dict[str, Any] | None:
    """Return hyperparameters with their schedules replaced by the values for one tensor.

    Args:
        hyperparameters: name to value, in its stored form.
        name: the tensor's name in a checkpoint.
        depth: relative depth of its layer; below 0 outside the layers.

    Returns:
        The resolved hyperparameters; None if none of them is a schedule.
    """
    if not has_schedules(hyperparameters):
        return None
    return jax.tree.map(
        lambda leaf: leaf.at(name, depth) if _is_schedule(leaf) else leaf,
        dict(hyperparameters),
        is_leaf=_is_schedule,
    )


def _is_schedule(value: Any) -> bool:
    return isinstance(value, Schedule)
