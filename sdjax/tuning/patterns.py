"""Patterns that map a vector of numbers to the hyperparameters of each tensor.

A pattern is the value of a parameter in a recipe (mergekit's YAML: a number, a list of numbers
along the layers, entries with a filter), with parameters to tune in place of numbers. It has two
readings with the same result: a value or schedule of the algorithm API, and YAML.

Numbers are rounded to six significant digits in both readings. What is scored is thus what is
written, and the text stays readable.

Axes: parameters.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax

from sdjax.merging.algorithm import Algorithm
from sdjax.merging.schedule import Schedule

Number = int | float
"""The index of a parameter (int), or a fixed number (float)."""


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """The value of one hyperparameter, of one expert if it has a value per expert.

    Attributes:
        numbers: for each entry, its numbers along the layers.
        filters: for each entry, the text that must be part of a tensor's name in a checkpoint; None
            for all tensors.
        step: whether numbers switch from one layer to the next instead of being interpolated; such
            a pattern has no YAML.
        last: names of tensors outside the layers that have the last number of a list.
    """

    numbers: tuple[tuple[Number, ...], ...]
    filters: tuple[str | None, ...] = (None,)
    step: bool = False
    last: frozenset[str] = frozenset()

    def value(self, values: Any) -> Any:
        """Return the hyperparameter's value: a number or a schedule.

        Args:
            values: the parameters' values [parameters], which may be traced.
        """
        chosen = tuple(tuple(_choose(n, values) for n in entry) for entry in self.numbers)
        if self.filters == (None,) and len(chosen[0]) == 1:
            return chosen[0][0]
        return Schedule(values=chosen, filters=self.filters, step=self.step, last=self.last)

    def yaml(self, values: Any) -> Any:
        """Return the parameter's value in a recipe, as YAML data."""
        assert not self.step
        entries = [
            [_choose(n, values) for n in entry] if len(entry) > 1 else _choose(entry[0], values)
            for entry in self.numbers
        ]
        if self.filters == (None,):
            return entries[0]
        return [
            {"value": entry} if pattern is None else {"filter": pattern, "value": entry}
            for pattern, entry in zip(self.filters, entries, strict=True)
        ]


@dataclass(frozen=True, kw_only=True)
class PatternedAlgorithm:
    """An algorithm whose hyperparameters follow patterns.

    Attributes:
        algorithm: the algorithm; hyperparameters without a pattern keep their values.
        shared: pattern of each hyperparameter that is the same for all experts.
        per_expert: patterns, in slot order, of each hyperparameter with a value per expert.
    """

    algorithm: Algorithm
    shared: Mapping[str, Pattern] = field(default_factory=dict)
    per_expert: Mapping[str, Sequence[Pattern]] = field(default_factory=dict)

    def bind(self, values: Any) -> Algorithm:
        """Return the algorithm at some values [parameters], which may be traced."""
        hyperparameters = dict(self.algorithm.hyperparameters)
        for name, pattern in self.shared.items():
            hyperparameters[name] = pattern.value(values)
        for name, patterns in self.per_expert.items():
            hyperparameters[name] = tuple(pattern.value(values) for pattern in patterns)
        return replace(self.algorithm, hyperparameters=hyperparameters)


def rounded(value: float) -> float:
    """Return a number rounded to six significant digits."""
    return float(f"{float(value):.6g}")


def _choose(number: Number, values: Any) -> Any:
    if isinstance(number, float):
        return number
    value = values[number]
    return value if isinstance(value, jax.core.Tracer) else rounded(value)
