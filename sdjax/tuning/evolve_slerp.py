"""Genomes of mergekit-evolve 0.1.5 over `slerp`, whose numbers choose the models too.

Each group of layers has one number per model. The two models with the largest numbers are merged,
with t = softmax(the two numbers)[1] from the largest to the second; of equal numbers, the first
counts as larger. t has a gradient in the two numbers, the choice has none.

Sources: `_slerp_slices` in mergekit/evo/genome.py of mergekit 0.1.5.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.merging.algorithm import Algorithm, TaskVectors, Tensor
from sdjax.merging.engine import default_slots
from sdjax.merging.methods.slerp import merge_models as slerp
from sdjax.merging.schedule import Schedule
from sdjax.merging.signature import PerExpert
from sdjax.tuning.patterns import rounded
from sdjax.tuning.recipe_text import dump_yaml
from sdjax.tuning.types import Parameter, Tunable

# t is between 0.02 and 0.5 within these bounds.
_LOW, _HIGH = -2.0, 2.0


def merge_models(
    task_vectors: TaskVectors, first: PerExpert = 1.0, second: PerExpert = 1.0, t: float = 0.5
) -> Tensor:
    """Return the point on the arc between two of the models, which are chosen by ones and zeros."""
    chosen = {
        place: sum(switches[slot] * vector for slot, vector in task_vectors.items())
        for place, switches in (("first", first), ("second", second))
    }
    return slerp(chosen, t=t)


_ALGORITHM = Algorithm.from_function(merge_models, name="slerp")


@dataclass(frozen=True, kw_only=True)
class SlerpGenome:
    """A genome over slerp.

    Attributes:
        name: name of its file.
        models: names of the models, at least two.
        labels: short names of the models.
        layers: layers per group; one group has all of them.
        groups: number of groups.
        last: names of tensors outside the layers that belong to the last group.
        dtype: dtype of the merged model, if the recipe states it.
    """

    name: str
    models: tuple[str, ...]
    labels: Sequence[str]
    layers: int
    groups: int
    last: frozenset[str]
    dtype: str | None

    def tunable(self) -> Tunable:
        """Return the genome's numbers as parameters."""
        return Tunable(
            name=self.name,
            slots=default_slots(len(self.models)),
            parameters=tuple(
                Parameter(
                    name=f"weight[{label}{f', group {group}' if self.groups > 1 else ''}]",
                    start=1 / len(self.models),
                    low=_LOW,
                    high=_HIGH,
                )
                for group in range(self.groups)
                for label in self.labels
            ),
            bind=self.bind,
            write=self.write,
            suffix=".yaml",
        )

    def bind(self, values: Any) -> Algorithm:
        """Return the algorithm at some values [parameters], which may be traced."""
        groups = [self._choose(values, group) for group in range(self.groups)]

        def scheduled(numbers: Sequence[Any]) -> Any:
            if len(numbers) == 1:
                return numbers[0]
            by_layer = tuple(number for number in numbers for _ in range(self.layers))
            return Schedule(values=(by_layer,), step=True, last=self.last)

        chosen: dict[str, Any] = {
            place: tuple(map(scheduled, zip(*(group[place] for group in groups), strict=True)))
            for place in ("first", "second")
        }
        chosen["t"] = scheduled([group["t"] for group in groups])
        return replace(_ALGORITHM, hyperparameters=chosen)

    def write(self, values: Any) -> str:
        """Return the recipe of mergekit-evolve at some values [parameters]."""
        data: dict[str, Any] = {"merge_method": "slerp"}
        slices = []
        for group in range(self.groups):
            numbers = self._choose(np.asarray(values), group)
            pair = [self.models[numbers[place].index(1.0)] for place in ("first", "second")]
            choice = {"base_model": pair[0], "parameters": {"t": numbers["t"]}}
            if self.groups == 1:
                data |= {"models": [{"model": model} for model in pair], **choice}
            else:
                place = [group * self.layers, (group + 1) * self.layers]
                sources = [{"model": model, "layer_range": place} for model in pair]
                slices.append({"sources": sources, **choice})
        if slices:
            data["slices"] = slices
        if self.dtype is not None:
            data["dtype"] = self.dtype
        return dump_yaml(data)

    def _choose(self, values: Any, group: int) -> dict[str, Any]:
        """Return the hyperparameters of a group."""
        count = len(self.models)
        numbers = values[group * count : (group + 1) * count]
        if isinstance(values, jax.core.Tracer):
            top, chosen = jax.lax.top_k(numbers, 2)
            switches = jnp.arange(count) == chosen[:, None]
            first, second = switches.astype(jnp.float32)
            return {"first": tuple(first), "second": tuple(second), "t": jax.nn.softmax(top)[1]}
        order = np.argsort(-np.asarray(numbers, np.float64), kind="stable")[:2]
        first, second = (tuple((np.arange(count) == place).astype(float)) for place in order)
        difference = float(numbers[order[0]]) - float(numbers[order[1]])
        return {"first": first, "second": second, "t": rounded(1 / (1 + np.exp(difference)))}
