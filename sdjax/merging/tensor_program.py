"""Computations that are compiled for a merge: one tensor, or the whole scope in the tree form.

Everything that may change without recompilation is an argument: weights, numeric hyperparameters,
depth and key. Arrays cross the jit boundary as tuples in slot order, since JAX sorts dicts by key,
and output shardings are pinned to those of the base.

Axes: *shape (the shape of the tensor).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.models.tensor_names import OUTSIDE_TENSORS, TensorName, kind_of, parse_name
from sdjax.xla.rematerialize import rematerialize

# An array, or the shape, dtype and sharding of one.
ArraySpec = jax.Array | jax.ShapeDtypeStruct


def tensor_key_data(key: jax.Array, path: str) -> np.ndarray:
    """Return the key data of one tensor, which depends on the key and the path alone.

    Computed on the host, so that nothing is compiled for it, also inside a trace.
    """
    with jax.ensure_compile_time_eval():
        data = np.asarray(jax.random.key_data(key))
    digest = hashlib.shake_256(data.tobytes() + b"\0" + path.encode()).digest(data.nbytes)
    return np.frombuffer(digest, data.dtype).reshape(data.shape)


@dataclass(frozen=True, kw_only=True)
class TensorProgram:
    """Merge of one tensor: the computation to compile, and its inputs besides the weights.

    The executable's arguments are (base, experts, *inputs, donated). It returns the new tensor and
    the scalar `statistic` of it, or None.

    Attributes:
        cache_key: programs with the same cache key share an executable.
        function: the merge, to be called inside another trace.
        lower: traces and lowers the merge.
        inputs: hyperparameter arrays, depth, key data and statistics of this tensor.
    """

    cache_key: tuple
    function: Callable[..., tuple[jax.Array, jax.Array | None]]
    lower: Callable[[], jax.stages.Lowered]
    inputs: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        slots: Sequence[str],
        base: ArraySpec | None,
        experts: tuple[ArraySpec, ...],
        *,
        path: str,
        depth: float = -1.0,
        key: jax.Array | None,
        dtype: Any = None,
        statistics: Mapping[str, Sequence[ArraySpec] | None] | None = None,
        donated: ArraySpec | None = None,
        statistic: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    ) -> TensorProgram:
        """Describe the merge of one tensor.

        Args:
            algorithm: an algorithm in the tensor form.
            slots: the experts' names.
            base: the base model's tensor, or None if the task vectors are the experts' weights.
            experts: the experts' tensors, all of the same shape.
            path: the tensor's canonical path, which determines its kind and its key.
            depth: relative depth of its layer, or -1 outside the layers.
            key: typed PRNG key of the merge; required if the algorithm requests one.
            dtype: dtype of the new tensor; by default that of the base.
            statistics: the experts' arrays of each statistic that the algorithm requests, or None
                if the tensor has none. Shapes alone are replaced in `inputs` before it is used.
            donated: an array of the new tensor's shape and dtype whose buffer is reused.
            statistic: function of the new tensor and the merged task vector to a scalar.
        """
        if algorithm.is_scheduled:
            algorithm = algorithm.at(parse_name(path).spellings[-1], depth)
        reference = experts[0] if base is None else base
        out_dtype = reference.dtype if dtype is None else jnp.dtype(dtype)
        requests, key_impl = algorithm.requests, _key_impl(algorithm, key)
        kind = kind_of(path) if "kind" in requests else None
        inputs = (
            algorithm.hyperparameter_arrays(slots),
            np.float32(depth) if "depth" in requests else None,
            None if key_impl is None or key is None else tensor_key_data(key, path),
            {k: None if x is None else tuple(x) for k, x in (statistics or {}).items()},
        )

        @jax.default_matmul_precision("highest")
        def merge_tensor(
            base: Any,
            experts: Any,
            hyperparameters: Any,
            depth: Any,
            key_data: Any,
            statistics: Mapping[str, Any],
            donated: Any,
        ) -> tuple[jax.Array, jax.Array | None]:
            del donated
            optional_inputs = {
                "base": _base_or_zeros(base, reference.shape),
                "depth": depth,
                "kind": kind,
                "key": _wrap_key(key_data, key_impl),
                **{
                    name: None if arrays is None else dict(zip(slots, arrays, strict=True))
                    for name, arrays in statistics.items()
                },
            }
            vectors = task_vectors(base, experts)
            merged = _call_algorithm(algorithm, slots, vectors, hyperparameters, optional_inputs)
            merged = _check_result(algorithm, merged, reference.shape, kind or "the tensor")
            new = _new_tensor(base, experts, merged, out_dtype)
            return new, None if statistic is None else statistic(new, merged)

        def lower() -> jax.stages.Lowered:
            shardings = (
                reference.sharding,
                None if statistic is None else replicated(reference.sharding),
            )
            # keep_unused: the donated argument is never read.
            return jax.jit(
                rematerialize(merge_tensor),
                out_shardings=shardings,
                donate_argnums=6,
                keep_unused=True,
            ).lower(*_abstract((base, experts)), *inputs, _abstract(donated))

        identity = ("tensor", algorithm.identity, tuple(slots), kind, key_impl, out_dtype.name)
        shapes = _describe((base, *experts, donated))
        known = tuple((k, x and _describe(x)) for k, x in sorted(inputs[3].items()))
        return cls(
            cache_key=(*identity, statistic, shapes, known),
            function=merge_tensor,
            lower=lower,
            inputs=inputs,
        )


@dataclass(frozen=True, kw_only=True)
class TreeProgram:
    """Merge of the whole scope by an algorithm in the tree form.

    The executable's arguments are (bases, experts, *inputs); it returns the new tensors and the
    squared norms of their task vectors (see `squared_norm_or_inf`).

    Attributes:
        cache_key: programs with the same cache key share an executable.
        function: the merge, to be called inside another trace.
        lower: traces and lowers the merge.
        inputs: hyperparameter arrays and key data.
    """

    cache_key: tuple
    function: Callable[..., tuple[tuple[jax.Array, ...], jax.Array]]
    lower: Callable[[], jax.stages.Lowered]
    inputs: tuple[Any, ...]

    @classmethod
    def of(
        cls,
        algorithm: Algorithm,
        slots: Sequence[str],
        tensors: Mapping[str, tuple[ArraySpec | None, tuple[ArraySpec, ...]]],
        *,
        changed: frozenset[str],
        key: jax.Array | None,
        dtype: Any = None,
    ) -> TreeProgram:
        """Describe the merge of a scope.

        Args:
            algorithm: an algorithm in the tree form.
            slots: the experts' names.
            tensors: canonical path to (base or None, experts). The algorithm sees all of them.
            changed: paths of the tensors that are replaced; the others are kept unchanged.
            key: typed PRNG key; required if the algorithm requests one.
            dtype: dtype of the new tensors; by default those of the bases.
        """
        paths = tuple(tensors)
        references = {
            p: experts[0] if base is None else base for p, (base, experts) in tensors.items()
        }
        key_impl = _key_impl(algorithm, key)
        inputs = (
            algorithm.hyperparameter_arrays(slots),
            None if key_impl is None or key is None else tensor_key_data(key, ""),
        )

        @jax.default_matmul_precision("highest")
        def merge_scope(
            bases: Any, experts: Any, hyperparameters: Any, key_data: Any
        ) -> tuple[tuple[jax.Array, ...], jax.Array]:
            by_path = [task_vectors(b, e) for b, e in zip(bases, experts, strict=True)]
            vectors = [
                {path: by_path[i][j] for i, path in enumerate(paths)} for j in range(len(slots))
            ]
            optional_inputs = {
                "base": {
                    path: _base_or_zeros(base, references[path].shape)
                    for path, base in zip(paths, bases, strict=True)
                },
                "key": _wrap_key(key_data, key_impl),
            }
            merged = _call_algorithm(algorithm, slots, vectors, hyperparameters, optional_inputs)
            if not isinstance(merged, Mapping) or set(merged) != set(paths):
                raise UserError(
                    f"{algorithm.name} must return a dict with the same paths as its input, "
                    f"not {_describe_result(merged)}"
                )
            new, squares = [], []
            for path, base, own in zip(paths, bases, experts, strict=True):
                if path not in changed:
                    continue
                vector = _check_result(algorithm, merged[path], references[path].shape, path)
                new.append(_new_tensor(base, own, vector, dtype or references[path].dtype))
                squares.append(squared_norm_or_inf(new[-1], vector))
            return tuple(new), jnp.stack(squares)

        def lower() -> jax.stages.Lowered:
            bases = _abstract(tuple(base for base, _ in tensors.values()))
            experts = _abstract(tuple(e for _, e in tensors.values()))
            pinned = tuple(references[path].sharding for path in paths if path in changed)
            norms = replicated(references[paths[0]].sharding)
            return jax.jit(merge_scope, out_shardings=(pinned, norms)).lower(
                bases, experts, *inputs
            )

        shapes = tuple((path, _describe((b, *e))) for path, (b, e) in tensors.items())
        out_dtype = None if dtype is None else jnp.dtype(dtype).name
        identity = ("tree", algorithm.identity, tuple(slots), key_impl, changed, out_dtype)
        return cls(cache_key=(*identity, shapes), function=merge_scope, lower=lower, inputs=inputs)


def check_layers(algorithm: Algorithm, names: Sequence[TensorName]) -> None:
    """Check that `depth` is known if an algorithm requests it.

    Args:
        algorithm: the algorithm.
        names: the tensors in scope.

    Raises:
        UserError: none of them is recognized as part of a layer, nor known to be outside.
    """
    if "depth" not in algorithm.requests:
        return
    if not any(name.layer is not None or name.path in OUTSIDE_TENSORS for name in names):
        raise UserError(
            f"{algorithm.name} requests depth, but no tensor in scope is recognized as part of a "
            f"layer, such as {names[0].path!r}; name the layers by number, such as layers/3/..., "
            "blocks/3/... or a list"
        )


def task_vectors(
    base: Float[Array, "*shape"] | None, experts: tuple[Float[Array, "*shape"], ...]
) -> tuple[Float[Array, "*shape"], ...]:
    """Return expert minus base in float32; the experts themselves if there is no base."""
    if base is None:
        return tuple(expert.astype(jnp.float32) for expert in experts)
    return tuple(expert.astype(jnp.float32) - base.astype(jnp.float32) for expert in experts)


def squared_norm_or_inf(
    new: Float[Array, "*shape"], merged: Float[Array, "*shape"]
) -> Float[Array, ""]:
    """Return the squared norm of the merged task vector; infinity if `new` is not finite."""
    # A single reduction for both: each further one adds about 20 ms of compilation on a CPU.
    return jnp.sum(jnp.where(jnp.isfinite(new), merged * merged, jnp.inf))


def _new_tensor(
    base: jax.Array | None, experts: tuple[jax.Array, ...], merged: jax.Array, dtype: Any
) -> jax.Array:
    """Add the merged task vector to the base and round once.

    Elements are NaN where an expert is not finite, since methods that compare magnitudes would hide
    that. The experts are read for the result anyway; a separate check would read them again.
    """
    new = (merged if base is None else base.astype(jnp.float32) + merged).astype(dtype)
    finite = functools.reduce(
        jnp.logical_and, [jnp.isfinite(expert.astype(jnp.float32)) for expert in experts]
    )
    return jnp.where(finite, new, jnp.array(jnp.nan, dtype))


def _call_algorithm(
    algorithm: Algorithm,
    slots: Sequence[str],
    vectors: Any,
    hyperparameters: Any,
    optional_inputs: Any,
) -> Any:
    """Call the algorithm inside the trace and turn its exceptions into one-line UserErrors."""
    try:
        return algorithm.call(slots, vectors, hyperparameters, optional_inputs)
    except UserError:
        raise
    except (jax.errors.ConcretizationTypeError, jax.errors.JAXTypeError) as error:
        raise UserError(
            f"{algorithm.name} uses an array's value in Python (if, while, int, float, range); "
            "it is unknown during compilation: write jnp.where(depth < 0.5, a, b) instead of "
            "`a if depth < 0.5 else b`"
        ) from error
    except Exception as error:
        first_line = " ".join(str(error).strip().splitlines()[:1])
        hint = f"; the experts are {', '.join(slots)}" if isinstance(error, KeyError) else ""
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise UserError(f"{algorithm.name}: {kind}{first_line}{hint}") from error


def _check_result(
    algorithm: Algorithm, merged: Any, shape: tuple[int, ...], name: str
) -> jax.Array:
    real = isinstance(merged, jax.Array | np.ndarray) and not jnp.iscomplexobj(merged)
    if not real or merged.shape != shape:
        raise UserError(
            f"{algorithm.name} must return one real array of shape {list(shape)} for {name}, "
            f"not {_describe_result(merged)}"
        )
    return jnp.asarray(merged).astype(jnp.float32)


def _describe_result(value: Any) -> str:
    if isinstance(value, jax.Array | np.ndarray):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, Mapping):
        return f"a dict with {len(value)} entries"
    return f"{type(value).__name__}"


def _base_or_zeros(base: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    return jnp.zeros(shape, jnp.float32) if base is None else base.astype(jnp.float32)


def _wrap_key(data: jax.Array | None, impl: str | None) -> jax.Array | None:
    return None if data is None else jax.random.wrap_key_data(data, impl=impl)


def _key_impl(algorithm: Algorithm, key: jax.Array | None) -> str | None:
    """Return the implementation of the key, or None if the algorithm is deterministic."""
    if "key" not in algorithm.requests:
        return None
    assert key is not None
    return str(jax.random.key_impl(key))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _describe(tensors: Sequence[ArraySpec | None]) -> tuple:
    """Return shape, dtype and sharding of each array; a tracer has no sharding."""
    return tuple(
        None
        if x is None
        else (x.shape, x.dtype.name, None if isinstance(x, jax.core.Tracer) else x.sharding)
        for x in tensors
    )


def replicated(sharding: jax.sharding.Sharding) -> jax.sharding.Sharding:
    """Return the sharding of an array that every device of a mesh holds entirely."""
    if isinstance(sharding, NamedSharding):
        return NamedSharding(sharding.mesh, PartitionSpec())
    return sharding
