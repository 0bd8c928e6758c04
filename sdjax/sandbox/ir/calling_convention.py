"""The order in which a program's arguments cross the wire, agreed on by worker and parent.

One slot's tensors after the other, then the base's, then the key, the depth and the float
hyperparameters in order of their names. All are always there, so that a program that asks for
something and does not use it is the same as one that does not ask.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from sdjax.sandbox.ir.parameters import KEY_DTYPE
from sdjax.sandbox.signature import MergeSignature

IR_VERSION = 1
REQUESTS = ("base", "key", "depth", "kind")


@dataclass(frozen=True, kw_only=True)
class CallingConvention:
    """One array program: for a tensor (`paths` is None) or for a whole tree."""

    slots: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    paths: tuple[str, ...] | None = None

    @property
    def leaves(self) -> int:
        return len(self.shapes)

    def position(self, request: str) -> range:
        """Where a request's inputs stand; hyperparameters begin where "depth" ends."""
        start = len(self.slots) * self.leaves
        key = start + self.leaves
        return {
            "base": range(start, key),
            "key": range(key, key + 1),
            "depth": range(key + 1, key + 2),
        }[request]

    def avals(self, hyperparameters: Sequence[str]) -> list[jax.ShapeDtypeStruct]:
        tensors = [jax.ShapeDtypeStruct(shape, np.float32) for shape in self.shapes]
        scalar = jax.ShapeDtypeStruct((), np.float32)
        key = jax.ShapeDtypeStruct((), KEY_DTYPE)
        return [*tensors * (len(self.slots) + 1), key, scalar, *[scalar] * len(hyperparameters)]

    def unpack(self, inputs: Sequence[Any], hyperparameters: Sequence[str]) -> tuple[dict, dict]:
        """(task_vectors, everything that may be asked for by name) from the flat arguments."""
        parts = [
            self._entry(inputs[i * self.leaves : (i + 1) * self.leaves])
            for i in range(len(self.slots) + 1)
        ]
        key, depth, *values = inputs[len(parts) * self.leaves :]
        asked = {"base": parts[-1], "key": key, "depth": depth}
        task_vectors = dict(zip(self.slots, parts[:-1], strict=True))
        return task_vectors, asked | dict(zip(hyperparameters, values, strict=True))

    def pack(
        self,
        task_vectors: Mapping[str, Any] | Sequence[Any],
        base: Any,
        key: Any,
        depth: Any,
        hyperparameters: Sequence[Any],
    ) -> list[Any]:
        """The flat arguments; what is None stays None."""
        if isinstance(task_vectors, Mapping):
            task_vectors = [task_vectors[slot] for slot in self.slots]
        flat = [leaf for entry in task_vectors for leaf in self._flat(entry)]
        bases = [None] * self.leaves if base is None else self._flat(base)
        return [*flat, *bases, key, depth, *hyperparameters]

    def result(self, outputs: Sequence[Any]) -> Any:
        return self._entry(outputs)

    def _entry(self, leaves: Sequence[Any]) -> Any:
        return leaves[0] if self.paths is None else dict(zip(self.paths, leaves, strict=True))

    def _flat(self, entry: Any) -> list[Any]:
        return [entry] if self.paths is None else [entry[path] for path in self.paths]


# A program's name on the wire: [kind or null, shape] for a tensor; a whole-tree program is
# "scope" (the real shapes) or "probe" (reduced ones).
@dataclass(frozen=True, kw_only=True)
class TracePlan:
    """Every array program of a message by name, in its order: those that it must hold, and those
    that it may hold for the probe runs (a program may well fail at reduced shapes alone)."""

    required: Mapping[Any, CallingConvention]
    optional: Mapping[Any, CallingConvention]
    probes: tuple[tuple[Any, Any], ...]  # (name to probe, name to probe where that is missing)

    @property
    def all(self) -> dict[Any, CallingConvention]:
        return {**self.required, **self.optional}


def trace_plan(signature: MergeSignature, form: str, by_kind: bool) -> TracePlan:
    """What to trace: a tree once, a tensor once per shape, or per kind and shape on request.

    Probed is a tree once, else every kind once, else one shape for each number of axes.
    """
    if form == "tree":
        probed = signature.probe_paths
        small = {} if probed == signature.paths else {"probe": _tree(signature, probed)}
        name = "probe" if small else "scope"
        whole = {"scope": _tree(signature, signature.paths)}
        return TracePlan(required=whole, optional=small, probes=((name, "scope"),))
    elements = signature.limits.probe_elements
    real = {(t.kind if by_kind else None, t.shape): t for t in signature.tensors}
    required: dict[Any, CallingConvention] = {of: _tensor(signature, of[1]) for of in real}
    probes: dict[Any, tuple[Any, Any]] = {}
    for of, tensor in real.items():
        group = of if by_kind else len(tensor.shape)
        probes.setdefault(group, ((of[0], tensor.reduced(elements).shape), of))
    optional = {of: _tensor(signature, of[1]) for of, _ in probes.values() if of not in required}
    return TracePlan(required=required, optional=optional, probes=tuple(probes.values()))


def _tensor(signature: MergeSignature, shape: tuple[int, ...]) -> CallingConvention:
    return CallingConvention(slots=signature.slots, shapes=(shape,))


def _tree(signature: MergeSignature, paths: Sequence[tuple[str, Any]]) -> CallingConvention:
    return CallingConvention(
        slots=signature.slots,
        shapes=tuple(signature.shape for _, signature in paths),
        paths=tuple(path for path, _ in paths),
    )
