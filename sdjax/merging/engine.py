"""The engine: an algorithm mapped over the tensors of a model.

For every tensor in scope::

    task_vector_j = float32(expert_j) - float32(base)
    new = round(float32(base) + algorithm(task_vectors))        once, to base's dtype

One program is compiled for each (algorithm, shapes, shardings, kind if the algorithm asks for it);
base, experts, float hyperparameters, depth and key are its arguments, so that the number of layers,
other experts and a sweep over coefficients compile nothing. Arrays cross the jit boundary as tuples
in slot order (JAX sorts dicts by key). Output shardings are pinned to the base leaf's.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.programs import Programs
from sdjax.merging.scope import Scope, select
from sdjax.models.spec import depth_of, kind_of
from sdjax.models.tree import flatten, unflatten

Tree = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Merged:
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
        programs: Programs | None = None,
    ) -> None:
        """base: nested dict of arrays, or None (task vectors are then the experts' own weights).
        experts: trees in slot order; leaves outside the scope may be absent.
        slots: the experts' names in the algorithm's dict; expert_1 ... expert_k by default.
        num_layers: for ``depth``; by default one more than the highest layer in the tree.

        Raises UserError for no experts, a missing leaf, or a shape that differs from the base's.
        """
        if not experts:
            raise UserError("a merge needs at least one expert")
        self.slots = tuple(slots) if slots is not None else default_slots(len(experts))
        if len(set(self.slots)) != len(experts):
            raise UserError(f"{len(experts)} experts need as many distinct names: {self.slots}")
        self.programs = programs if programs is not None else Programs()
        self._base = None if base is None else flatten(base)
        flat_experts = [flatten(expert) for expert in experts]
        reference = flat_experts[0] if self._base is None else self._base
        self.paths = select(reference, scope)
        self._leaves = {
            path: _leaf(path, None if base is None else reference, flat_experts, self.slots)
            for path in self.paths
        }
        self._num_layers = num_layers if num_layers is not None else _count_layers(reference)
        squares = jax.device_get({p: squared_norms(*leaf) for p, leaf in self._leaves.items()})
        self.live = frozenset(p for p, s in squares.items() if not np.all(s == 0))
        total = np.sum([np.asarray(s, np.float64) for s in squares.values()], axis=0)
        self.norms = np.sqrt(total)  # [experts], over the scope

    def __call__(self, algorithm: Algorithm, *, key: jax.Array | None = None) -> Merged:
        """Merge. ``key``: typed PRNG key, needed if the algorithm asks for one.

        Raises UserError when the algorithm does not trace or returns something other than one
        array of the tensor's shape.
        """
        if "key" in algorithm.requests and key is None:
            raise UserError(f"{algorithm.name} draws random numbers: pass a key")
        merge_leaves = self._merge_tree if algorithm.form == "tree" else self._merge_tensors
        new, squares = merge_leaves(algorithm, key)
        norm = math.sqrt(float(np.sum(np.asarray(jax.device_get(squares), np.float64))))
        mean = float(np.mean(self.norms))
        leaves = (
            self._base if self._base is not None else {p: x[1][0] for p, x in self._leaves.items()}
        )
        return Merged(
            params=unflatten({**leaves, **new}),
            finite=math.isfinite(norm),
            change=norm / mean if mean else 0.0,
        )

    def _merge_tensors(self, algorithm: Algorithm, key: jax.Array | None) -> tuple[dict, list]:
        arguments = algorithm.arguments(self.slots)
        paths = [path for path in self.paths if path in self.live]
        wanted = [
            TensorProgram.of(
                algorithm,
                self.slots,
                *self._leaves[path],
                kind=kind_of(path) if "kind" in algorithm.requests else None,
                key=key,
            )
            for path in paths
        ]
        compiled = self.programs.get(wanted)
        new, squares = {}, []
        for path, program in zip(paths, compiled, strict=True):
            base, experts = self._leaves[path]
            depth = data = None
            if "depth" in algorithm.requests:
                depth = np.float32(depth_of(path, self._num_layers))
            if "key" in algorithm.requests:
                data = leaf_key_data(key, path)
            new[path], square = program(base, experts, arguments, depth, data)
            squares.append(square)
        return new, squares

    def _merge_tree(self, algorithm: Algorithm, key: jax.Array | None) -> tuple[dict, list]:
        if not self.live:
            return {}, []
        wanted = TreeProgram.of(algorithm, self.slots, self._leaves, live=self.live, key=key)
        (program,) = self.programs.get([wanted])
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
    programs: Programs | None = None,
) -> Merged:
    """Merge once; see ``Merger``, which is what to use for many merges of the same experts."""
    kept = _SHARED if programs is None else programs
    merger = Merger(base, experts, slots=slots, scope=scope, num_layers=num_layers, programs=kept)
    return merger(algorithm, key=key)


_SHARED = Programs()


def default_slots(count: int) -> tuple[str, ...]:
    """The experts' names in a discovered program."""
    return tuple(f"expert_{i + 1}" for i in range(count))


@jax.jit
def squared_norms(base: jax.Array | None, experts: tuple[jax.Array, ...]) -> jax.Array:
    """[experts] float32: the squared norm of each task vector of one leaf."""
    return jnp.stack([jnp.sum(t * t) for t in _task_vectors(base, experts)])


def leaf_key_data(key: jax.Array | None, path: str) -> np.ndarray:
    """Key data for one leaf, from (key, path) alone: no order, depth or device count enters it.

    Hashed on the host, so that no program is compiled for it.
    """
    assert key is not None
    data = np.asarray(jax.random.key_data(key))
    digest = hashlib.shake_256(data.tobytes() + b"\0" + path.encode()).digest(data.nbytes)
    return np.frombuffer(digest, data.dtype).reshape(data.shape)


@dataclass(frozen=True, kw_only=True)
class TensorProgram:
    """What has to be compiled to merge one leaf: the cache key, and how to lower it."""

    cache_key: tuple
    lower: Callable[[], jax.stages.Lowered]

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        slots: Sequence[str],
        base: jax.Array | None,
        experts: tuple[jax.Array, ...],
        *,
        kind: str | None,
        key: jax.Array | None,
        dtype: Any = None,
    ) -> TensorProgram:
        """Arguments of the compiled program: base, experts, arguments, depth, key data.

        It returns the new leaf, in ``dtype`` (by default as the base has it), and the squared norm
        of the merged task vector (infinite when the new leaf is not finite).
        """
        like = experts[0] if base is None else base
        stored = like.dtype if dtype is None else jnp.dtype(dtype)
        implementation = _implementation(algorithm, key)

        def program(base, experts, arguments, depth, data):
            vectors = _task_vectors(base, experts)
            requested = {
                "base": jnp.zeros(like.shape, jnp.float32) if base is None else _wide(base),
                "depth": depth,
                "kind": kind,
                "key": data
                if data is None
                else jax.random.wrap_key_data(data, impl=implementation),
            }
            merged = _run(algorithm, slots, vectors, arguments, requested)
            merged = _checked(algorithm, merged, like.shape, kind or "the tensor")
            new = _apply(base, merged, stored)
            return new, _finite_square(new, merged)

        def lower() -> jax.stages.Lowered:
            shapes = _abstract((base, experts))
            depth = np.float32(0) if "depth" in algorithm.requests else None
            data = leaf_key_data(key, "") if "key" in algorithm.requests else None
            pinned = (like.sharding, _scalar_sharding(like))
            with jax.default_matmul_precision("highest"):
                return jax.jit(program, out_shardings=pinned).lower(
                    *shapes, algorithm.arguments(slots), depth, data
                )

        shapes = _describe((base, *experts))
        identity = ("tensor", algorithm.identity, tuple(slots), kind, implementation, stored.name)
        return cls(cache_key=(*identity, shapes), lower=lower)


@dataclass(frozen=True, kw_only=True)
class TreeProgram:
    """As TensorProgram, for the tree form: one program over the whole scope."""

    cache_key: tuple
    lower: Callable[[], jax.stages.Lowered]

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        slots: Sequence[str],
        leaves: Mapping[str, tuple[jax.Array | None, tuple[jax.Array, ...]]],
        *,
        live: frozenset[str],
        key: jax.Array | None,
    ) -> TreeProgram:
        """``leaves``: path to (base, experts). Leaves outside ``live`` are shown to the algorithm,
        but stay as they are. Arguments: bases, experts (tuples in path order), arguments, key data.
        """
        paths = tuple(leaves)
        likes = {p: experts[0] if base is None else base for p, (base, experts) in leaves.items()}
        implementation = _implementation(algorithm, key)

        def program(bases, experts, arguments, data):
            by_leaf = [_task_vectors(b, e) for b, e in zip(bases, experts, strict=True)]
            vectors = [
                {path: by_leaf[i][j] for i, path in enumerate(paths)} for j in range(len(slots))
            ]
            flat_base = {
                path: jnp.zeros(likes[path].shape, jnp.float32) if b is None else _wide(b)
                for path, b in zip(paths, bases, strict=True)
            }
            wrap = data is not None
            requested = {
                "base": flat_base,
                "key": jax.random.wrap_key_data(data, impl=implementation) if wrap else None,
            }
            merged = _run(algorithm, slots, vectors, arguments, requested)
            if not isinstance(merged, Mapping) or set(merged) != set(paths):
                raise UserError(
                    f"{algorithm.name} must return a dict with the paths it was given, "
                    f"not {_describe_result(merged)}"
                )
            new, squares = [], []
            for path, base in zip(paths, bases, strict=True):
                if path not in live:
                    continue
                leaf = _checked(algorithm, merged[path], likes[path].shape, path)
                new.append(_apply(base, leaf, likes[path].dtype))
                squares.append(_finite_square(new[-1], leaf))
            return tuple(new), jnp.sum(jnp.stack(squares))

        def lower() -> jax.stages.Lowered:
            bases = _abstract(tuple(base for base, _ in leaves.values()))
            experts = _abstract(tuple(e for _, e in leaves.values()))
            pinned = tuple(likes[path].sharding for path in paths if path in live)
            data = leaf_key_data(key, "") if "key" in algorithm.requests else None
            with jax.default_matmul_precision("highest"):
                return jax.jit(
                    program, out_shardings=(pinned, _scalar_sharding(likes[paths[0]]))
                ).lower(bases, experts, algorithm.arguments(slots), data)

        shapes = tuple((path, _describe((b, *e))) for path, (b, e) in leaves.items())
        identity = ("tree", algorithm.identity, tuple(slots), implementation, live)
        return cls(cache_key=(*identity, shapes), lower=lower)


def _run(
    algorithm: Algorithm, slots: Sequence[str], vectors: Any, arguments: Any, requested: Any
) -> Any:
    """The algorithm's own code, inside the trace, with its errors told in one line."""
    try:
        return algorithm.call(slots, vectors, arguments, requested)
    except UserError:
        raise
    except (jax.errors.ConcretizationTypeError, jax.errors.JAXTypeError) as error:
        raise UserError(
            f"{algorithm.name} takes a Python decision (if, while, int, float, range) on the value "
            "of an array, which is not known while compiling; write "
            "jnp.where(depth < 0.5, a, b) instead of `a if depth < 0.5 else b`"
        ) from error
    except Exception as error:
        first = str(error).strip().splitlines()[:1]
        raise UserError(f"{algorithm.name}: {type(error).__name__}: {' '.join(first)}") from error


def _checked(algorithm: Algorithm, merged: Any, shape: tuple[int, ...], where: str) -> jax.Array:
    dtype = getattr(merged, "dtype", None)
    real = isinstance(merged, jax.Array | np.ndarray) and not jnp.iscomplexobj(merged)
    if not real or dtype is None or merged.shape != shape:
        raise UserError(
            f"{algorithm.name} must return one real array of shape {list(shape)} for {where}, "
            f"not {_describe_result(merged)}"
        )
    return jnp.asarray(merged).astype(jnp.float32)


def _describe_result(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {len(value)} entries"
    return f"{type(value).__name__}"


def _wide(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32)


def _task_vectors(base: jax.Array | None, experts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    if base is None:
        return tuple(_wide(expert) for expert in experts)
    return tuple(_wide(expert) - _wide(base) for expert in experts)


def _apply(base: jax.Array | None, merged: jax.Array, dtype: Any) -> jax.Array:
    return (merged if base is None else _wide(base) + merged).astype(dtype)


def _finite_square(new: jax.Array, merged: jax.Array) -> jax.Array:
    # One reduction says both: every further one costs some 20 ms of compilation on a CPU.
    return jnp.sum(jnp.where(jnp.isfinite(new), merged * merged, jnp.inf))


def _implementation(algorithm: Algorithm, key: jax.Array | None) -> str | None:
    if "key" not in algorithm.requests:
        return None
    assert key is not None
    return str(jax.random.key_impl(key))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _describe(leaves: Sequence[jax.Array | None]) -> tuple:
    return tuple(None if x is None else (x.shape, x.dtype.name, x.sharding) for x in leaves)


def _scalar_sharding(like: jax.Array) -> jax.sharding.Sharding:
    if isinstance(like.sharding, NamedSharding):
        return NamedSharding(like.sharding.mesh, PartitionSpec())
    return like.sharding


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
    return (None if base is None else jnp.asarray(base[path]), tuple(found))


def _count_layers(paths: Mapping[str, Any]) -> int:
    layers = [int(path.split("/")[1]) for path in paths if path.startswith("layers/")]
    return max(layers, default=0) + 1
