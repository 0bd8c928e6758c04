"""What is compiled to merge: one leaf with the tensor form, or the whole scope with the tree form.

A program's arguments are all that may change without compiling anew: weights, hyperparameters that
are numbers, depth and key. Arrays cross the jit boundary as tuples in slot order (JAX sorts dicts
by key), and output shardings are pinned to the base leaf's.
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

from sdjax.core.errors import UserError
from sdjax.merging.algorithm import Algorithm
from sdjax.xla.rematerialize import rematerialize

# What a program is compiled for: an array, or the shape, dtype and sharding of one.
Leaf = jax.Array | jax.ShapeDtypeStruct


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
        base: Leaf | None,
        experts: tuple[Leaf, ...],
        *,
        kind: str | None,
        key: jax.Array | None,
        dtype: Any = None,
        into: Leaf | None = None,
        measure: Callable[[jax.Array, jax.Array], jax.Array] | None = None,
    ) -> TensorProgram:
        """Arguments of the compiled program: base, experts, arguments, depth, key data, into.

        It returns the new leaf, in ``dtype`` (by default as the base has it), and the scalar that
        ``measure`` finds of the new leaf and the merged task vector, or None without it. into: an
        array of the new leaf's shape and dtype whose buffer the new leaf gets; it is gone
        afterwards.
        """
        like = experts[0] if base is None else base
        stored = like.dtype if dtype is None else jnp.dtype(dtype)
        implementation = _implementation(algorithm, key)

        def program(base, experts, arguments, depth, data, into):
            vectors = task_vectors(base, experts)
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
            new = _apply(base, experts, merged, stored)
            return new, None if measure is None else measure(new, merged)

        def lower() -> jax.stages.Lowered:
            shapes = _abstract((base, experts))
            depth = np.float32(0) if "depth" in algorithm.requests else None
            data = leaf_key_data(key, "") if "key" in algorithm.requests else None
            pinned = (like.sharding, None if measure is None else _scalar_sharding(like))
            with jax.default_matmul_precision("highest"):
                # `into` is read by nothing, and only lends its buffer.
                return jax.jit(
                    rematerialize(program),
                    out_shardings=pinned,
                    donate_argnums=5,
                    keep_unused=True,
                ).lower(*shapes, algorithm.arguments(slots), depth, data, _abstract(into))

        shapes = _describe((base, *experts, into))
        identity = ("tensor", algorithm.identity, tuple(slots), kind, implementation, stored.name)
        return cls(cache_key=(*identity, measure, shapes), lower=lower)


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
            by_leaf = [task_vectors(b, e) for b, e in zip(bases, experts, strict=True)]
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
            for path, base, leaves in zip(paths, bases, experts, strict=True):
                if path not in live:
                    continue
                leaf = _checked(algorithm, merged[path], likes[path].shape, path)
                new.append(_apply(base, leaves, leaf, likes[path].dtype))
                squares.append(squared_norm_or_inf(new[-1], leaf))
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


def task_vectors(base: jax.Array | None, experts: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    """In float32; the experts themselves where there is no base."""
    if base is None:
        return tuple(_wide(expert) for expert in experts)
    return tuple(_wide(expert) - _wide(base) for expert in experts)


def _apply(
    base: jax.Array | None, experts: tuple[jax.Array, ...], merged: jax.Array, dtype: Any
) -> jax.Array:
    """The new leaf, rounded once; NaN where an expert is not finite, which a method that compares
    would hide. Its experts are read for the result anyway, apart they would be read again.
    """
    new = (merged if base is None else _wide(base) + merged).astype(dtype)
    finite = functools.reduce(jnp.logical_and, [jnp.isfinite(_wide(one)) for one in experts])
    return jnp.where(finite, new, jnp.array(jnp.nan, dtype))


def squared_norm_or_inf(new: jax.Array, merged: jax.Array) -> jax.Array:
    """The squared norm of the merged task vector, infinite when the new leaf is not finite."""
    # One reduction says both: every further one costs some 20 ms of compilation on a CPU.
    return jnp.sum(jnp.where(jnp.isfinite(new), merged * merged, jnp.inf))


def _implementation(algorithm: Algorithm, key: jax.Array | None) -> str | None:
    if "key" not in algorithm.requests:
        return None
    assert key is not None
    return str(jax.random.key_impl(key))


def _abstract(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def _describe(leaves: Sequence[Leaf | None]) -> tuple:
    return tuple(None if x is None else (x.shape, x.dtype.name, x.sharding) for x in leaves)


def _scalar_sharding(like: Leaf) -> jax.sharding.Sharding:
    if isinstance(like.sharding, NamedSharding):
        return NamedSharding(like.sharding.mesh, PartitionSpec())
    return like.sharding
