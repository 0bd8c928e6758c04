"""Order of the arguments of an array program, shared by worker and parent.

The tensors of each slot come first, then those of the base, the key, the depth, and the traced
hyperparameters sorted by name. One with a value per expert is one scalar per slot, "weight.1",
"weight.2" and so on. All of them are always present, so a candidate that requests an
input without using it has the same IR as one that does not request it.
"""

import math
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
    """Arguments of one array program.

    Attributes:
        slots: names of the experts.
        shapes: shape of each leaf of one expert.
        paths: path of each leaf of a tree; None if the program merges one tensor.
    """

    slots: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    paths: tuple[str, ...] | None = None

    @property
    def num_leaves(self) -> int:
        """Number of tensors per expert."""
        return len(self.shapes)

    @property
    def elements(self) -> int:
        """Number of elements of one expert's tensors."""
        return sum(math.prod(shape) for shape in self.shapes)

    def position(self, request: str) -> range:
        """Return the argument positions of an optional input; hyperparameters follow "depth"."""
        start = len(self.slots) * self.num_leaves
        key = start + self.num_leaves
        return {
            "base": range(start, key),
            "key": range(key, key + 1),
            "depth": range(key + 1, key + 2),
        }[request]

    def avals(self, hyperparameters: Sequence[str]) -> list[jax.ShapeDtypeStruct]:
        """Return the shape and dtype of every argument."""
        tensors = [jax.ShapeDtypeStruct(shape, np.float32) for shape in self.shapes]
        scalar = jax.ShapeDtypeStruct((), np.float32)
        key = jax.ShapeDtypeStruct((), KEY_DTYPE)
        return [*tensors * (len(self.slots) + 1), key, scalar, *[scalar] * len(hyperparameters)]

    def pack(
        self,
        task_vectors: Mapping[str, Any] | Sequence[Any],
        base: Any,
        key: Any,
        depth: Any,
        hyperparameters: Sequence[Any],
    ) -> list[Any]:
        """Return the flat arguments. Inputs that are None stay None."""
        if isinstance(task_vectors, Mapping):
            task_vectors = [task_vectors[slot] for slot in self.slots]
        leaves = [leaf for tree in task_vectors for leaf in self._leaves(tree)]
        bases = [None] * self.num_leaves if base is None else self._leaves(base)
        return [*leaves, *bases, key, depth, *hyperparameters]

    def result(self, leaves: Sequence[Any]) -> Any:
        """Return leaves as one tensor, or as a dict from path to tensor."""
        return leaves[0] if self.paths is None else dict(zip(self.paths, leaves, strict=True))

    def _leaves(self, tree: Any) -> list[Any]:
        return [tree] if self.paths is None else [tree[path] for path in self.paths]


@dataclass(frozen=True, kw_only=True)
class TracePlan:
    """Array programs to trace for a candidate, by name.

    The name of an array program is (kind or None, shape) for one tensor. For a tree, it is "scope"
    at the real shapes and "probe" at reduced shapes.

    Attributes:
        required: array programs that the IR must contain, in order.
        optional: array programs for the probe runs. They may be absent, because a candidate may
            fail at reduced shapes only.
        probes: (name to probe, name to probe if that is absent).
    """

    required: Mapping[Any, CallingConvention]
    optional: Mapping[Any, CallingConvention]
    probes: tuple[tuple[Any, Any], ...]

    @property
    def all(self) -> dict[Any, CallingConvention]:
        """Required and optional array programs, in the order of the IR."""
        return {**self.required, **self.optional}


def trace_plan(signature: MergeSignature, form: str, by_kind: bool) -> TracePlan:
    """Return the array programs to trace: one per tree, per shape, or per kind and shape.

    A tree is probed once. Otherwise every kind and shape is probed if `by_kind`, else one shape per
    number of axes.
    """
    if form == "tree":
        reduced_paths = signature.probe_paths
        is_small = reduced_paths == signature.paths
        scope = {"scope": _tree(signature, signature.paths)}
        probe = {} if is_small else {"probe": _tree(signature, reduced_paths)}
        probed = "scope" if is_small else "probe"
        return TracePlan(required=scope, optional=probe, probes=((probed, "scope"),))
    max_elements = signature.limits.probe_elements
    tensors = {(t.kind if by_kind else None, t.shape): t for t in signature.tensors}
    required: dict[Any, CallingConvention] = {name: _tensor(signature, name[1]) for name in tensors}
    probes: dict[Any, tuple[Any, Any]] = {}
    for name, tensor in tensors.items():
        group = name if by_kind else len(tensor.shape)
        probes.setdefault(group, ((name[0], tensor.reduced(max_elements).shape), name))
    optional = {
        name: _tensor(signature, name[1]) for name, _ in probes.values() if name not in required
    }
    return TracePlan(required=required, optional=optional, probes=tuple(probes.values()))


def _tensor(signature: MergeSignature, shape: tuple[int, ...]) -> CallingConvention:
    return CallingConvention(slots=signature.slots, shapes=(shape,))


def _tree(signature: MergeSignature, paths: Sequence[tuple[str, Any]]) -> CallingConvention:
    return CallingConvention(
        slots=signature.slots,
        shapes=tuple(tensor.shape for _, tensor in paths),
        paths=tuple(path for path, _ in paths),
    )
