"""Merge engine: applies an algorithm to the tensors of a model.

For every tensor in scope::

    task_vector_j = float32(expert_j) - float32(base)
    new = round(float32(base) + algorithm(task_vectors))        once, to base's dtype

One executable is compiled per algorithm, shape and sharding, and per kind if the algorithm requests
it. Base, experts, numeric hyperparameters, depth and key are its arguments, so further layers,
other experts and sweeps over coefficients do not recompile.

Each executable also computes `squared_norm_or_inf` of its result, for `MergedModel.finite` and
`MergedModel.change`. On a mesh that is one scalar all-reduce, the only collective of an elementwise
method.

Axes: *shape (of the tensor), experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.compile_cache import CompileCache
from sdjax.merging.scope import Scope, select_paths
from sdjax.merging.tensor_program import (
    TensorProgram,
    TreeProgram,
    squared_norm_or_inf,
    task_vectors,
)
from sdjax.models.tensor_names import parse_name
from sdjax.models.tree import flatten, unflatten
from sdjax.xla.reductions import sums

Tree = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class MergedModel:
    """Result of an in-memory merge.

    Attributes:
        params: the base's tree with the tensors in scope replaced; all others are the base's own
            arrays. Without a base, only the tensors in scope.
        finite: whether every merged tensor is finite after rounding.
        change: ||merged task vector|| / mean_j ||task_vector_j||, Euclidean norms over the scope;
            0.0 if every task vector is zero, not finite if the merged one is not.
    """

    params: dict[str, Any]
    finite: bool
    change: float


class Merger:
    """Repeated merges of the same base and experts, as in a search.

    The experts' norms, and which tensors no expert has changed, are computed once.

    Examples:
        >>> import sdjax
        >>> from sdjax.merging.methods.registry import algorithm
        >>> _, seed = sdjax.load_model("zoo:seed")
        >>> experts = [sdjax.load_model(f"zoo:{name}")[1] for name in ("reader", "accountant")]
        >>> merger = sdjax.Merger(seed, experts)
        >>> method = algorithm("task_arithmetic")
        >>> changes = [merger(method.bind(scale=s)).change for s in (0.5, 1.0)]
        >>> round(changes[1] / changes[0], 3)
        2.0

    Attributes:
        slots: names of the experts.
        compile_cache: cache of the executables, which mergers may share.
        paths: paths of the tensors in scope.
        changed: those that some expert has changed.
        norms: float64 [experts], the norm of each task vector over the scope.
    """

    def __init__(
        self,
        base: Tree | None,
        experts: Sequence[Tree],
        *,
        slots: Sequence[str] | None = None,
        scope: Scope = "mlp",
        num_layers: int | None = None,
        compile_cache: CompileCache | None = None,
    ) -> None:
        """Prepare merges of the same models.

        Args:
            base: nested dict of arrays, or None if the task vectors are the experts' own weights.
            experts: nested dicts in slot order; tensors outside the scope may be missing.
            slots: the experts' names; by default expert_1 ... expert_k.
            scope: "mlp", "attention", "all", or glob patterns over tensor paths.
            num_layers: number of layers, for `depth`; by default one more than the highest layer.
            compile_cache: cache to use; by default a new one.

        Raises:
            UserError: no experts, an argument that is not a tree of arrays, a tensor that is
                missing, is not floating point, or differs in shape or devices from the base's.
        """
        if not experts:
            raise UserError("a merge needs at least one expert")
        self.slots = tuple(slots) if slots is not None else default_slots(len(experts))
        if len(set(self.slots)) != len(experts):
            raise UserError(
                f"{len(experts)} experts need {len(experts)} distinct names, not {self.slots}"
            )
        self.compile_cache = compile_cache if compile_cache is not None else CompileCache()
        self._base = None if base is None else flatten_arrays(base, "the base")
        flat_experts = [
            flatten_arrays(tree, slot) for slot, tree in zip(self.slots, experts, strict=True)
        ]
        reference = flat_experts[0] if self._base is None else self._base
        self.paths = select_paths(reference, scope)
        self._tensors = {
            path: _aligned_tensors(path, self._base, flat_experts, self.slots)
            for path in self.paths
        }
        self._num_layers = num_layers if num_layers is not None else _count_layers(reference)
        squares = jax.device_get(
            {path: task_vector_squared_norms(*tensors) for path, tensors in self._tensors.items()}
        )
        self.changed = frozenset(path for path, s in squares.items() if not np.all(s == 0))
        total = np.sum([np.asarray(s, np.float64) for s in squares.values()], axis=0)
        self.norms = np.sqrt(total)

    def __call__(
        self,
        algorithm: Algorithm,
        *,
        key: jax.Array | None = None,
        donate: MergedModel | None = None,
        max_memory: int | None = None,
    ) -> MergedModel:
        """Merge the models by an algorithm.

        Args:
            algorithm: the algorithm, in either form.
            key: typed PRNG key; required if the algorithm requests one.
            donate: an earlier result of this merger; its buffers are donated to the new result
                (writing to fresh memory is several times slower). Ignored by the tree form.
            max_memory: limit on an executable's temporary memory per device, in bytes.

        Raises:
            MemoryLimitExceeded: an executable needs more memory; nothing has run.
            UserError: the algorithm does not trace or does not return one array of the tensor's
                shape, a key is missing, or `donate` does not match.
        """
        if "key" in algorithm.requests and not _is_key(key):
            raise UserError(
                f"{algorithm.name} draws random numbers; pass a key such as jax.random.key(0)"
            )
        if algorithm.form == "tree":
            new, squares = self._merge_tree(algorithm, key, max_memory)
        else:
            new, squares = self._merge_tensors(
                algorithm, key, self._donated_tensors(donate), max_memory
            )
        norm = math.sqrt(float(np.sum(np.asarray(jax.device_get(squares), np.float64))))
        mean = float(np.mean(self.norms))
        unchanged = self._base
        if unchanged is None:
            unchanged = {path: experts[0] for path, (_, experts) in self._tensors.items()}
        return MergedModel(
            params=unflatten({**unchanged, **new}),
            finite=math.isfinite(norm),
            change=norm / mean if mean else 0.0,
        )

    def _donated_tensors(self, donate: MergedModel | None) -> dict[str, jax.Array]:
        """Return the merged tensors of an earlier result, never those of the base or an expert."""
        if donate is None:
            return {}
        if not isinstance(donate, MergedModel):
            raise UserError(f"donate must be an earlier result, not {type(donate).__name__}")
        earlier = flatten(donate.params)
        donated = {}
        for path in (path for path in self.paths if path in self.changed):
            base, experts = self._tensors[path]
            reference = experts[0] if base is None else base
            tensor = earlier.get(path)
            if tensor is None or (tensor.shape, tensor.dtype) != (reference.shape, reference.dtype):
                raise UserError(f"donate: no {path} of this shape; pass a result of this merger")
            if not tensor.sharding.is_equivalent_to(reference.sharding, tensor.ndim):
                raise UserError(f"donate: {path} has a different sharding")
            if any(tensor is source for source in (base, *experts)):
                raise UserError(f"donate: {path} is not a merged tensor; pass an earlier result")
            if tensor.is_deleted():
                raise UserError("donate: the buffers of this result were donated before")
            donated[path] = tensor
        return donated

    def _merge_tensors(
        self,
        algorithm: Algorithm,
        key: jax.Array | None,
        donated: Mapping[str, jax.Array],
        max_memory: int | None,
    ) -> tuple[dict, list]:
        """Return the changed tensors by path, and the squared norms of their task vectors."""
        paths = [path for path in self.paths if path in self.changed]
        programs = [
            TensorProgram.of(
                algorithm,
                self.slots,
                *self._tensors[path],
                path=path,
                depth=parse_name(path).depth(self._num_layers),
                key=key,
                donated=donated.get(path),
                statistic=squared_norm_or_inf,
            )
            for path in paths
        ]
        executables = self.compile_cache.get(programs, max_memory)
        new, squares = {}, []
        for path, program, executable in zip(paths, programs, executables, strict=True):
            base, experts = self._tensors[path]
            new[path], square = executable(base, experts, *program.inputs, donated.get(path))
            squares.append(square)
        return new, squares

    def _merge_tree(
        self, algorithm: Algorithm, key: jax.Array | None, max_memory: int | None
    ) -> tuple[dict, list]:
        if not self.changed:
            return {}, []
        program = TreeProgram.of(
            algorithm, self.slots, self._tensors, changed=self.changed, key=key
        )
        (executable,) = self.compile_cache.get([program], max_memory)
        bases = tuple(base for base, _ in self._tensors.values())
        experts = tuple(experts for _, experts in self._tensors.values())
        tensors, square = executable(bases, experts, *program.inputs)
        new = dict(zip([p for p in self.paths if p in self.changed], tensors, strict=True))
        return new, [square]


_SHARED_CACHE = CompileCache()


def merge(
    base: Tree | None,
    experts: Sequence[Tree],
    algorithm: Algorithm,
    *,
    slots: Sequence[str] | None = None,
    scope: Scope = "mlp",
    key: jax.Array | None = None,
    num_layers: int | None = None,
    compile_cache: CompileCache | None = None,
    donate: MergedModel | None = None,
) -> MergedModel:
    """Merge once; see `Merger` for the arguments and for many merges of the same experts."""
    merger = Merger(
        base,
        experts,
        slots=slots,
        scope=scope,
        num_layers=num_layers,
        compile_cache=_SHARED_CACHE if compile_cache is None else compile_cache,
    )
    return merger(algorithm, key=key, donate=donate)


def default_slots(count: int) -> tuple[str, ...]:
    """Return the experts' default names: expert_1 ... expert_k."""
    return tuple(f"expert_{i + 1}" for i in range(count))


@jax.jit
def task_vector_squared_norms(
    base: Float[Array, "*shape"] | None, experts: tuple[Float[Array, "*shape"], ...]
) -> Float[Array, " experts"]:
    """Return the squared norm of each task vector of one tensor, in float32."""
    return jnp.stack(sums([t * t for t in task_vectors(base, experts)]))


def _aligned_tensors(
    path: str,
    base: Mapping[str, Any] | None,
    experts: Sequence[Mapping[str, Any]],
    slots: Sequence[str],
) -> tuple[jax.Array | None, tuple[jax.Array, ...]]:
    """Return (base or None, experts) at one path; check that shapes and devices match."""
    reference = (experts[0] if base is None else base)[path]
    for slot, expert in zip(slots, experts, strict=True):
        if path not in expert:
            raise UserError(f"{slot} has no tensor {path!r}, which is in the scope of the merge")
        if expert[path].shape != reference.shape:
            raise UserError(
                f"tensor {path!r}: {slot} has shape {list(expert[path].shape)}, "
                f"{'the base' if base is not None else slots[0]} {list(reference.shape)}"
            )
    base_tensor = None if base is None else jnp.asarray(base[path])
    expert_tensors = tuple(jnp.asarray(expert[path]) for expert in experts)
    tensors = [tensor for tensor in (base_tensor, *expert_tensors) if tensor is not None]
    for tensor in tensors:
        if not jnp.issubdtype(tensor.dtype, jnp.floating):
            raise UserError(f"tensor {path!r}: {tensor.dtype} cannot be merged; use floats")
    if any(t.sharding.device_set != tensors[0].sharding.device_set for t in tensors):
        raise UserError(
            f"tensor {path!r}: the models are on different devices; pass `mesh` to merge, or put "
            "all models on the same devices"
        )
    return base_tensor, expert_tensors


def flatten_arrays(tree: Any, name: str) -> dict[str, Any]:
    """Flatten a tree into a dict from path to array.

    Args:
        tree: nested dict of arrays.
        name: name of the model in error messages.

    Raises:
        UserError: anything that is not a nested dict of arrays.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"{name} must be a nested dict of arrays, not {type(tree).__name__}")
    leaves = flatten(tree)
    for path, leaf in leaves.items():
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            raise UserError(f"{name}: {path!r} must be an array, not {type(leaf).__name__}")
    return leaves


def _is_key(key: object) -> bool:
    if not isinstance(key, jax.Array):
        return False
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key) and key.shape == ()


def _count_layers(paths: Mapping[str, Any]) -> int:
    indices = [path.split("/")[1] for path in paths if path.startswith("layers/")]
    return max((int(index) for index in indices if index.isdigit()), default=0) + 1
