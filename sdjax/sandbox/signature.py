"""Merge signature: expert slots, tensors in scope and limits that a candidate is traced for."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from sdjax.sandbox.config import Limits


@dataclass(frozen=True, kw_only=True, order=True)
class TensorSignature:
    """Properties of a tensor that a candidate sees: its kind ("mlp.down_proj") and its shape."""

    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def reduced(self, max_elements: int) -> "TensorSignature":
        """Return the same kind with all axes halved until it has at most `max_elements`."""
        shape = self.shape
        while math.prod(shape) > max_elements:
            shape = tuple(-(-n // 2) for n in shape)
        return TensorSignature(kind=self.kind, shape=shape)


@dataclass(frozen=True, kw_only=True)
class MergeSignature:
    """Inputs of a merge algorithm, and the limits it must respect.

    Attributes:
        slots: names of the experts, in the order in which their tensors are passed.
        tensors: distinct tensor signatures in scope.
        paths: every tensor path in scope with its signature; empty if only `tensors` are known.
        parameters: hyperparameters that the user has set, by name. The bool, int and str ones are
            set before tracing; of the others, and of None, only the names are checked.
        limits: limits on a candidate.
    """

    slots: tuple[str, ...]
    tensors: tuple[TensorSignature, ...]
    paths: tuple[tuple[str, TensorSignature], ...] = ()
    parameters: tuple[tuple[str, object], ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        in_paths = {tensor for _, tensor in self.paths}
        object.__setattr__(self, "tensors", tuple(sorted(set(self.tensors) | in_paths)))
        object.__setattr__(self, "paths", tuple(sorted(self.paths)))
        if not self.slots or not self.tensors:
            raise ValueError("a merge signature needs at least one expert slot and one tensor")

    @classmethod
    def of(
        cls,
        slots: Sequence[str],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        limits: Limits | None = None,
    ) -> "MergeSignature":
        """Build the signature of a model.

        Args:
            slots: names of the experts.
            tensors: path -> (kind, shape) of the tensors in scope.
            limits: limits on a candidate. By default, the number of equations grows with the
                number of distinct tensors and slots.
        """
        paths = tuple(
            (path, TensorSignature(kind=kind, shape=tuple(shape)))
            for path, (kind, shape) in sorted(tensors.items())
        )
        distinct = tuple(tensor for _, tensor in paths)
        if limits is None:
            equations = 350 * len(set(distinct)) * len(slots)
            limits = Limits(equations=max(Limits.equations, equations))
        return cls(slots=tuple(slots), tensors=distinct, paths=paths, limits=limits)

    @cached_property
    def scope(self) -> tuple[TensorSignature, ...]:
        """One signature per tensor in scope; the distinct ones if no paths are known."""
        return tuple(tensor for _, tensor in self.paths) or self.tensors

    def per_expert_names(self, hyperparameter: str) -> list[str]:
        """Return the names of the scalars of a hyperparameter that has one value per expert."""
        return [f"{hyperparameter}.{number + 1}" for number in range(len(self.slots))]

    @cached_property
    def probe_paths(self) -> tuple[tuple[str, TensorSignature], ...]:
        """The paths with the reduced shapes that whole-tree candidates are probed at."""
        max_elements = max(64, 8 * self.limits.probe_elements // max(1, len(self.paths)))
        return tuple((path, tensor.reduced(max_elements)) for path, tensor in self.paths)

    def to_json(self) -> str:
        """Serialize for a worker; `from_json` is the inverse."""
        limits = {f.name: getattr(self.limits, f.name) for f in dataclasses.fields(Limits)}
        data = {n: getattr(self, n) for n in ("slots", "tensors", "paths", "parameters")}
        return json.dumps(data | {"limits": limits}, default=dataclasses.asdict)

    @classmethod
    def from_json(cls, text: str) -> "MergeSignature":
        """Deserialize the result of `to_json`."""

        def tensor(data: dict) -> TensorSignature:
            return TensorSignature(kind=data["kind"], shape=tuple(data["shape"]))

        data = json.loads(text)
        return cls(
            slots=tuple(data["slots"]),
            tensors=tuple(tensor(t) for t in data["tensors"]),
            paths=tuple((path, tensor(t)) for path, t in data["paths"]),
            parameters=tuple(map(tuple, data["parameters"])),
            limits=Limits(**data["limits"]),
        )
