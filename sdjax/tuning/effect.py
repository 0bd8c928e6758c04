"""Which numbers have an effect on a merge; the others stay at their initial values.

A number has none if it belongs to tensors that no expert changes, such as the weight of a filter or
of a kind of tensors that fine-tuning left alone.

Axes: parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, Float

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import Merger
from sdjax.merging.model_tree import Tensors
from sdjax.models.tensor_names import parse_name
from sdjax.tuning.differentiability import blocking_operations
from sdjax.tuning.types import Tunable, restricted

_MAX_NAMES = 3


def without_idle_numbers(
    tunable: Tunable, merger: Merger, key: jax.Array
) -> tuple[Tunable, tuple[str, ...]]:
    """Return what is tuned without the numbers that have no effect, and a note that names them.

    Args:
        tunable: what is tuned.
        merger: merger of the base and the experts; the merge is only traced.
        key: typed PRNG key of the merge, for random methods.

    Raises:
        UserError: no number has an effect.
    """
    size = len(tunable.parameters)
    blocked = blocking_operations(representative_merges(merger, tunable, key), size)
    idle = [number for number, operations in blocked.items() if not operations]
    if not idle:
        return tunable, ()
    if len(idle) == size:
        raise UserError(
            f"{tunable.name}: the merge depends on none of its numbers; check the scope, and that "
            "the experts differ from the base"
        )
    kept = [number for number in range(size) if number not in blocked or blocked[number]]
    names = listed([tunable.parameters[number].name for number in idle])
    have = "has no effect on the merge and stays at its initial value"
    if len(idle) > 1:
        have = "have no effect on the merge and stay at their initial values"
    return restricted(tunable, kept), (f"{names} {have}",)


def representative_merges(
    merger: Merger, tunable: Tunable, key: jax.Array
) -> Callable[[Float[Array, " parameters"]], Any]:
    """Return the function from values to merged tensors, as few as show how values are used."""

    def merges(values: Float[Array, " parameters"]) -> Any:
        algorithm = tunable.bind(values)
        tensors = representative_tensors(merger, algorithm)
        return merger.merge_in_trace(algorithm, tensors, key=key)

    return merges


def representative_tensors(merger: Merger, algorithm: Algorithm) -> Tensors:
    """Return one tensor per kind and shape, or all of them.

    Numbers that differ between layers reach only some tensors, so that all are needed.
    """
    tensors = dict(merger.tensors)
    if algorithm.form == "tree" or algorithm.is_scheduled:
        return tensors
    places = {
        (parse_name(path).kind, parse_name(path).layer is None, experts[0].shape): path
        for path, (_, experts) in tensors.items()
        if path in merger.changed
    }
    return {path: tensors[path] for path in places.values()}


def listed(names: list[str]) -> str:
    """Return the first names of a list, and how many more there are."""
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
