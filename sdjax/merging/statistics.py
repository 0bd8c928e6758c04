"""Statistics of the experts on data, which some methods weight them with.

Statistics of one model are a mapping from name to float32 array; `sdjax stats` computes them, and
`sdjax.load_stats` reads them. The names are "fisher/PATH", "gram/PATH" and "input_norm/PATH" with
the canonical path of the tensor, such as "fisher/layers/3/mlp/down_proj":

`fisher`      mean over examples of the squared gradient of the log-likelihood, with the tensor's
              shape (the diagonal of the Fisher information)
`gram`        mean over tokens of x xᵀ, x the input of a linear map: [in, in]
`input_norm`  root mean square over tokens of every feature of that input: [in]

The last two exist for weights of linear maps alone, so not for embeddings, norms and biases.

Axes: *shape (of the statistic).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from sdjax.core.errors import UserError
from sdjax.merging.signature import STATISTICS
from sdjax.merging.tensor_program import replicated

HOW = "compute them with `sdjax stats MODEL --data FILE`"
BY = "by `stats:` in a recipe or by --stats NAME=DIR"

# Linear maps with the same input have one entry, under the name of the first of them.
SAME_INPUT = {
    "attn/k_proj": "attn/q_proj",
    "attn/v_proj": "attn/q_proj",
    "mlp/up_proj": "mlp/gate_proj",
}


class Statistics(Protocol):
    """A mapping from name to an array, or to anything with a shape and a dtype."""

    def __contains__(self, name: object, /) -> bool:
        """Return whether there is such a statistic."""
        ...

    def __getitem__(self, name: str, /) -> Any:
        """Return a statistic by its name."""
        ...

    def keys(self) -> Collection[str]:
        """Return all names."""
        ...


def statistic_name(kind: str, path: str) -> str:
    """Return the name of a tensor's statistic.

    Args:
        kind: "fisher", "gram" or "input_norm".
        path: canonical path of the tensor.

    Examples:
        >>> statistic_name("gram", "layers/3/attn/v_proj")
        'gram/layers/3/attn/q_proj'
    """
    if kind != "fisher":
        for own, shared in SAME_INPUT.items():
            if path.endswith(f"/{own}"):
                path = path.removesuffix(own) + shared
    return f"{kind}/{path}"


def check_statistics(
    name: str, requests: Collection[str], stats: Sequence[Statistics] | None, slots: Sequence[str]
) -> None:
    """Check that the experts have the statistics that an algorithm requests.

    Args:
        name: the algorithm's name.
        requests: its optional inputs.
        stats: statistics of each expert, if any are known.
        slots: the experts' names.

    Raises:
        UserError: there are none, or one of the experts has none of this kind.
    """
    for kind in STATISTICS:
        if kind not in requests:
            continue
        if stats is None:
            raise UserError(f"{name} needs statistics of the experts on data ({kind}); {HOW}")
        for slot, own in zip(slots, stats, strict=True):
            if not any(key.startswith(f"{kind}/") for key in own.keys()):  # noqa: SIM118
                raise UserError(
                    f"{name}: the statistics of {slot} have no {kind}; compute them with `sdjax "
                    f"stats MODEL --data FILE --kinds {kind} --out DIR`, and name DIR {BY}"
                )


def tensor_statistics(
    requests: Collection[str],
    stats: Sequence[Statistics] | None,
    slots: Sequence[str],
    path: str | Sequence[str],
    shape: tuple[int, ...],
) -> dict[str, tuple[Any, ...] | None]:
    """Return the experts' statistics of one tensor by kind; None if the tensor has none.

    Args:
        requests: optional inputs of the algorithm.
        stats: statistics of each expert; needed if the algorithm requests any.
        slots: the experts' names.
        path: canonical path of the tensor, or one per expert.
        shape: its shape.

    Raises:
        UserError: only some experts have a statistic, or it has the shape of another model's.
    """
    paths = [path] * len(slots) if isinstance(path, str) else path
    found: dict[str, tuple[Any, ...] | None] = {}
    for kind in STATISTICS:
        if kind not in requests or stats is None:
            continue
        names = [statistic_name(kind, own) for own in paths]
        present = [name in own for name, own in zip(names, stats, strict=True)]
        found[kind] = None
        if not any(present):
            continue
        if not all(present):
            index = present.index(False)
            raise UserError(
                f"the statistics of {slots[index]} lack {names[index]}, which those of "
                f"{slots[present.index(True)]} have; compute all of them by the same version"
            )
        expected = {"fisher": shape, "gram": 2 * shape[-1:], "input_norm": shape[-1:]}[kind]
        arrays = tuple(own[name] for name, own in zip(names, stats, strict=True))
        for slot, name, array in zip(slots, names, arrays, strict=True):
            if tuple(array.shape) != expected:
                raise UserError(
                    f"the statistics of {slot}: {name} has shape {list(array.shape)}, not "
                    f"{list(expected)}; they belong to another model"
                )
        found[kind] = arrays
    return found


def place_statistics(
    statistics: Mapping[str, Sequence[Any] | None], reference: jax.Array
) -> dict[str, tuple[jax.Array, ...] | None]:
    """Return the statistics of one tensor on its devices: sharded as it is, or replicated.

    Args:
        statistics: arrays by kind, as `tensor_statistics` returns them.
        reference: the tensor.
    """

    def place(array: Any) -> jax.Array:
        if isinstance(reference, jax.core.Tracer) or isinstance(array, jax.core.Tracer):
            return jnp.asarray(array)
        same = array.shape == reference.shape
        return jax.device_put(array, reference.sharding if same else replicated(reference.sharding))

    return {
        kind: None if arrays is None else tuple(map(place, arrays))
        for kind, arrays in statistics.items()
    }
