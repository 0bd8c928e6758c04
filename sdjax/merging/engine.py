"""The engine: an algorithm mapped over the tensors of a model.

For every tensor in scope::

    task_vector_j = float32(expert_j) - float32(base)
    new = round(float32(base) + algorithm(task_vectors))        once, to base's dtype

One program is compiled for each (algorithm, shapes, shardings, kind if the algorithm asks for it);
base, experts, float hyperparameters, depth and key are its arguments, so that the number of layers,
other experts and a sweep over coefficients compile nothing.

Each program also measures its result (``finite_square``, for ``Merged.finite`` and ``change``): on
a mesh that is one scalar all-reduce, the only collective of an elementwise method.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.reductions import sums
from sdjax.merging.scope import Scope, select_paths
from sdjax.merging.tensor_program import (
    TensorProgram,
    TreeProgram,
    leaf_key_data,
    squared_norm_or_inf,
    task_vectors,
)
from sdjax.models.params import depth_of, kind_of
from sdjax.models.tree import flatten, unflatten

Tree = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """A merged model and what is to be known of it at once.

    params: base's tree with the leaves in scope replaced (the other leaves are base's own arrays);
        without a base, the leaves in scope alone.
    finite: whether every merged leaf is finite, after rounding.
    change: ||merged task vector|| / mean_j ||task_vector_j||, Euclidean norms over the scope;
        0.0 when every task vector is zero, not finite when the merged one is not.
    """

    params: dict[str, Any]
    finite: bool
    change: float


class Merger:
    """Merges the same base and experts again and again, as a search does.

    The experts' norms, and which leaves no expert has changed, are found once, here. Compiled
    programs are kept in ``programs`` (least recently used are dropped), shared between mergers if
    the caller passes one.
    """

    def __init__(
        self,
        base: Tree | None,
        experts: Sequence[Tree],
        *,
        slots: Sequence[str] | None = None,
        scope: Scope = "mlp",
        num_layers: int | None = None,
        programs: CompileCache | None = None,
    ) -> None:
        """base: nested dict of arrays, or None (task vectors are then the experts' own weights).
        experts: trees in slot order; leaves outside the scope may be absent.
        slots: the experts' names in the algorithm's dict; expert_1 ... expert_k by default.
        num_layers: for ``depth``; by default one more than the highest layer in the tree.

        Raises UserError for no experts, what is no tree of arrays, a missing leaf, a leaf that is
        no float, or whose shape or devices are not the base's.
        """
        if not experts:
            raise UserError("a merge needs at least one expert")
        self.slots = tuple(slots) if slots is not None else default_slots(len(experts))
        if len(set(self.slots)) != len(experts):
            raise UserError(f"{len(experts)} experts need as many distinct names: {self.slots}")
        self.programs = programs if programs is not None else CompileCache()
        self._base = None if base is None else arrays_of(base, "the base")
        flat_experts = [
            arrays_of(tree, slot) for slot, tree in zip(self.slots, experts, strict=True)
        ]
        reference = flat_experts[0] if self._base is None else self._base
        self.paths = select_paths(reference, scope)
        self._leaves = {
            path: _leaf(path, None if base is None else reference, flat_experts, self.slots)
            for path in self.paths
        }
        self._num_layers = num_layers if num_layers is not None else _count_layers(reference)
        squares = jax.device_get(
            {p: task_vector_squared_norms(*leaf) for p, leaf in self._leaves.items()}
        )
        self.live = frozenset(p for p, s in squares.items() if not np.all(s == 0))
        total = np.sum([np.asarray(s, np.float64) for s in squares.values()], axis=0)
        self.norms = np.sqrt(total)  # [experts], over the scope

    def __call__(
        self,
        algorithm: Algorithm,
        *,
        key: jax.Array | None = None,
        donate: MergedModel | None = None,
        max_memory: int | None = None,
    ) -> MergedModel:
        """Merge. ``key``: typed PRNG key, needed if the algorithm asks for one.

        reuse: an earlier result of this merger that nobody needs any more: its merged leaves lend
        their buffers to the new ones and are gone (writing to fresh memory is several times slower
        than to memory in use). The tree form allocates anew.
        max_memory: bytes that a compiled program may take on a device beside its arguments and
        results.

        Raises MemoryLimitExceeded, before anything has run, when one takes more, and UserError when the
        algorithm does not trace or returns something other than one array of the tensor's shape.
        """
        if "key" in algorithm.requests and not _is_key(key):
            told = "draws random numbers: pass one key, jax.random.key(0)"
            raise UserError(f"{algorithm.name} {told}")
        if algorithm.form == "tree":
            new, squares = self._merge_tree(algorithm, key, max_memory)
        else:
            lent = self._reusable(donate)
            new, squares = self._merge_tensors(algorithm, key, lent, max_memory)
        norm = math.sqrt(float(np.sum(np.asarray(jax.device_get(squares), np.float64))))
        mean = float(np.mean(self.norms))
        leaves = (
            self._base if self._base is not None else {p: x[1][0] for p, x in self._leaves.items()}
        )
        return MergedModel(
            params=unflatten({**leaves, **new}),
            finite=math.isfinite(norm),
            change=norm / mean if mean else 0.0,
        )

    def _reusable(self, donate: MergedModel | None) -> dict[str, jax.Array]:
        """The merged leaves of an earlier result; never an array of the base or of an expert."""
        if donate is None:
            return {}
        if not isinstance(donate, MergedModel):
            raise UserError(f"reuse: {type(donate).__name__} is no earlier result of a merge")
        earlier = flatten(donate.params)
        lent = {}
        for path in (path for path in self.paths if path in self.live):
            base, experts = self._leaves[path]
            like = experts[0] if base is None else base
            leaf = earlier.get(path)
            if leaf is None or (leaf.shape, leaf.dtype) != (like.shape, like.dtype):
                raise UserError(f"reuse: it has no {path} of this shape; give an earlier result")
            if not leaf.sharding.is_equivalent_to(like.sharding, leaf.ndim):
                raise UserError(f"reuse: {path} lies otherwise on the devices than this merge's")
            if any(leaf is other for other in (base, *experts)):
                raise UserError(f"reuse: {path} is no merged tensor; give an earlier result")
            if leaf.is_deleted():
                raise UserError("reuse: this result has lent its memory already; give another")
            lent[path] = leaf
        return lent

    def _merge_tensors(
        self,
        algorithm: Algorithm,
        key: jax.Array | None,
        lent: Mapping[str, jax.Array],
        max_memory: int | None,
    ) -> tuple[dict, list]:
        arguments = algorithm.arguments(self.slots)
        paths = [path for path in self.paths if path in self.live]
        wanted = [
            TensorProgram.of(
                algorithm,
                self.slots,
                *self._leaves[path],
                kind=kind_of(path) if "kind" in algorithm.requests else None,
                key=key,
                into=lent.get(path),
                measure=squared_norm_or_inf,
            )
            for path in paths
        ]
        compiled = self.programs.get(wanted, max_memory)
        new, squares = {}, []
        for path, program in zip(paths, compiled, strict=True):
            base, experts = self._leaves[path]
            depth = data = None
            if "depth" in algorithm.requests:
                depth = np.float32(depth_of(path, self._num_layers))
            if "key" in algorithm.requests:
                data = leaf_key_data(key, path)
            new[path], square = program(base, experts, arguments, depth, data, lent.get(path))
            squares.append(square)
        return new, squares

    def _merge_tree(
        self, algorithm: Algorithm, key: jax.Array | None, max_memory: int | None
    ) -> tuple[dict, list]:
        if not self.live:
            return {}, []
        wanted = TreeProgram.of(algorithm, self.slots, self._leaves, live=self.live, key=key)
        (program,) = self.programs.get([wanted], max_memory)
        data = leaf_key_data(key, "") if "key" in algorithm.requests else None
        bases = tuple(base for base, _ in self._leaves.values())
        experts = tuple(experts for _, experts in self._leaves.values())
        leaves, square = program(bases, experts, algorithm.arguments(self.slots), data)
        new = dict(zip([p for p in self.paths if p in self.live], leaves, strict=True))
        return new, [square]


def merge(
    base: Tree | None,
    experts: Sequence[Tree],
    algorithm: Algorithm,
    *,
    slots: Sequence[str] | None = None,
    scope: Scope = "mlp",
    key: jax.Array | None = None,
    num_layers: int | None = None,
    programs: CompileCache | None = None,
    donate: MergedModel | None = None,
) -> MergedModel:
    """Merge once; see ``Merger``, which is what to use for many merges of the same experts."""
    kept = _SHARED if programs is None else programs
    merger = Merger(base, experts, slots=slots, scope=scope, num_layers=num_layers, programs=kept)
    return merger(algorithm, key=key, donate=donate)


_SHARED = CompileCache()


def default_slots(count: int) -> tuple[str, ...]:
    """The experts' names in a discovered program."""
    return tuple(f"expert_{i + 1}" for i in range(count))


@jax.jit
def task_vector_squared_norms(base: jax.Array | None, experts: tuple[jax.Array, ...]) -> jax.Array:
    """[experts] float32: the squared norm of each task vector of one leaf."""
    return jnp.stack(sums([t * t for t in task_vectors(base, experts)]))


def _leaf(
    path: str,
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]],
    slots: Sequence[str],
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """(base or None, experts) of one path, as arrays of one shape."""
    found = []
    first = experts[0] if base is None else base
    for slot, expert in zip(slots, experts, strict=True):
        if path not in expert:
            raise UserError(f"{slot} has no tensor {path!r}, which is in the scope of the merge")
        if expert[path].shape != first[path].shape:
            raise UserError(
                f"tensor {path!r}: {slot} has shape {list(expert[path].shape)}, "
                f"{'the base' if base is not None else slots[0]} {list(first[path].shape)}"
            )
        found.append(jnp.asarray(expert[path]))
    at = None if base is None else jnp.asarray(base[path])
    leaves = [leaf for leaf in (at, *found) if leaf is not None]
    for leaf in leaves:
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            raise UserError(f"tensor {path!r}: {leaf.dtype} cannot be merged; use floats")
    if len({leaf.sharding.device_set == leaves[0].sharding.device_set for leaf in leaves}) > 1:
        raise UserError(
            f"tensor {path!r}: the models lie on different devices; give merge the mesh, or put "
            "all on the same devices"
        )
    return at, tuple(found)


def arrays_of(tree: Any, whose: str) -> dict[str, Any]:
    """Path to leaf. Raises UserError for what is no tree of arrays; ``whose``: its name there."""
    if not isinstance(tree, Mapping):
        kind = type(tree).__name__
        raise UserError(f"{whose} must be a tree (a nested dict of arrays), not {kind}")
    leaves = flatten(tree)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise UserError(f"{whose}: {path!r} is no array but {type(leaf).__name__}")
    return leaves


def _is_key(key: object) -> bool:
    if not isinstance(key, jax.Array):
        return False
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()


def _count_layers(paths: Mapping[str, Any]) -> int:
    places = [path.split("/")[1] for path in paths if path.startswith("layers/")]
    layers = [int(place) for place in places if place.isdigit()]
    return max(layers, default=0) + 1
