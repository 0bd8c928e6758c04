"""What a program is judged against: expert slots, tensor signatures, limits."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property


@dataclass(frozen=True, kw_only=True, order=True)
class TensorSignature:
    """A tensor as a program can tell it from another: its kind ("mlp.down_proj") and its shape."""

    kind: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def reduced(self, elements: int) -> "TensorSignature":
        """The same kind with all its axes halved until it holds at most `elements`."""
        shape = self.shape
        while math.prod(shape) > elements:
            shape = tuple(-(-n // 2) for n in shape)
        return TensorSignature(kind=self.kind, shape=shape)


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Budgets. All but the two clocks and `address_space` decide alike on every machine."""

    source_bytes: int = 32_768
    ir_bytes: int = 4 << 20  # of the child's message
    constant_bytes: int = 1 << 20  # of all constants of one program
    steps: int = 20_000  # rounds of Python loops and calls in one trace
    equations: int = 4_000  # of all array programs of one source text; `primitives.weight`
    nesting: int = 8  # of scan, while and cond
    growth: int = 32  # elements of one intermediate, relative to the tensors of one slot; and
    # twice as much may be alive at once
    cost_per_element: int = 20_000  # scalar operations per element of the scope
    max_loop_iterations: int = 128  # iterations that a `while` may take
    rounds: int = 1_000_000  # of all loops of one array program, those within loops multiplied
    probe_elements: int = 1 << 12  # larger tensors are probed at a reduced shape
    probe_most: int = 1 << 20  # elements of one slot, where a program works at real shapes alone
    probe_cost: int = 2_000_000_000  # scalar operations of one probe run, which nobody can kill
    cpu_seconds: int = 4
    wall_seconds: float = 12.0
    address_space: int = 2 << 30


@dataclass(frozen=True, kw_only=True)
class MergeSignature:
    """The expert slots, the distinct tensors of the scope, and every path with its signature."""

    slots: tuple[str, ...]
    tensors: tuple[TensorSignature, ...]
    paths: tuple[tuple[str, TensorSignature], ...] = ()
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        named = {signature for _, signature in self.paths}
        object.__setattr__(self, "tensors", tuple(sorted(set(self.tensors) | named)))
        object.__setattr__(self, "paths", tuple(sorted(self.paths)))
        if not self.slots or not self.tensors:
            raise ValueError("a contract needs at least one expert slot and one tensor")

    @classmethod
    def of(
        cls,
        slots: Sequence[str],
        tensors: Mapping[str, tuple[str, tuple[int, ...]]],
        limits: Limits | None = None,
    ) -> "MergeSignature":
        """From a mapping of path to (kind, shape), the leaves in scope of one model.

        limits: by default, operations are allowed in proportion to tensors and slots.
        """
        paths = tuple(
            (path, TensorSignature(kind=kind, shape=tuple(shape)))
            for path, (kind, shape) in sorted(tensors.items())
        )
        distinct = tuple(signature for _, signature in paths)
        if limits is None:
            equations = 350 * len(set(distinct)) * len(slots)
            limits = Limits(equations=max(Limits.equations, equations))
        return cls(slots=tuple(slots), tensors=distinct, paths=paths, limits=limits)

    @cached_property
    def scope(self) -> tuple[TensorSignature, ...]:
        """One signature for every tensor of the scope (each once where no path is named)."""
        return tuple(signature for _, signature in self.paths) or self.tensors

    @cached_property
    def probe_paths(self) -> tuple[tuple[str, TensorSignature], ...]:
        """The paths as the probe run of a whole-tree program sees them."""
        each = max(64, 8 * self.limits.probe_elements // max(1, len(self.paths)))
        return tuple((path, signature.reduced(each)) for path, signature in self.paths)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "MergeSignature":
        def signature(data: dict) -> TensorSignature:
            return TensorSignature(kind=data["kind"], shape=tuple(data["shape"]))

        data = json.loads(text)
        return cls(
            slots=tuple(data["slots"]),
            tensors=tuple(signature(t) for t in data["tensors"]),
            paths=tuple((path, signature(t)) for path, t in data["paths"]),
            limits=Limits(**data["limits"]),
        )
