"""Merging in memory: `sdjax.merge`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import Mesh

from sdjax.core.errors import UserError
from sdjax.merging import engine
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import MergedModel, arrays_of
from sdjax.merging.methods.registry import algorithm
from sdjax.merging.scope import Scope
from sdjax.models.params import LAYER_TENSORS, OUTSIDE_TENSORS, kind_of
from sdjax.models.tree import unflatten
from sdjax.sharding.rules import sharding_of

Tree = Mapping[str, Any]
Method = str | Algorithm | Callable[..., Any]

_LAYER_AXES = {name.replace("/", "."): axes for name, (_, axes) in LAYER_TENSORS.items()}
_OUTSIDE_AXES = {name: axes for name, (_, axes) in OUTSIDE_TENSORS.items()}


def merge(
    base: Tree | None,
    experts: Sequence[Tree] | Mapping[str, Tree],
    method: Method,
    *,
    scope: Scope = "mlp",
    mesh: Mesh | None = None,
    key: jax.Array | None = None,
    donate: MergedModel | None = None,
    **hyperparameters: Any,
) -> MergedModel:
    """Merge models that are in memory.

        merged = sdjax.merge(seed, [math, code], "ties", density=0.3, scale=0.8)
        merged.params    # the seed's tree, its MLP tensors replaced

    One program is compiled a shape and method; hyperparameters that are numbers are its arguments,
    so that a sweep over them compiles nothing. Where the same models are merged thousands of
    times, make a ``sdjax.Merger`` of them, which measures the experts once.

    Args:
        base: nested dict of arrays that task vectors are relative to, or None, where they are the
            experts' own weights.
        experts: trees in the order of the slots expert_1 ... expert_k, or by name; of an expert,
            leaves outside the scope may be absent.
        method: a name of ``sdjax methods``, a function of the algorithm API, or an algorithm.
        scope: "mlp", "attention", "all", or glob patterns over tensor paths.
        mesh: places every leaf in scope on it by ``sdjax.sharding.rules``; leaves stay where they
            are without.
        key: typed PRNG key, for methods that draw random numbers.
        reuse: an earlier result whose merged leaves lend their buffers and are gone.
        hyperparameters: of the method.

    Returns:
        The merged parameters, whether they are finite, and how large the change is.

    Raises:
        UserError: an unknown method or hyperparameter, models that do not fit together, a key that
            is missing, a program that does not trace.
    """
    if not isinstance(experts, Mapping | Sequence):
        raise UserError(f"experts are a list of trees, or trees by name, not {experts!r:.60}")
    slots = tuple(experts) if isinstance(experts, Mapping) else None
    trees = list(experts.values()) if isinstance(experts, Mapping) else list(experts)
    if not isinstance(mesh, Mesh | None):
        raise UserError(f"mesh must be a jax.sharding.Mesh, not {type(mesh).__name__}")
    if mesh is not None:
        base = None if base is None else place_on_mesh(base, mesh)
        trees = [place_on_mesh(tree, mesh) for tree in trees]
    return engine.merge(
        base,
        trees,
        _bound(method, hyperparameters),
        slots=slots,
        scope=scope,
        key=key,
        donate=donate,
    )


def place_on_mesh(tree: Tree, mesh: Mesh) -> dict[str, Any]:
    """The tree with every leaf on the mesh; a leaf that is there already is not copied."""
    return unflatten(
        {
            path: jax.device_put(leaf, _sharding(path, leaf, mesh))
            for path, leaf in arrays_of(tree, "a model").items()
        }
    )


def _sharding(path: str, leaf: Any, mesh: Mesh) -> jax.sharding.Sharding:
    axes = (_LAYER_AXES if path.startswith("layers/") else _OUTSIDE_AXES).get(kind_of(path), ())
    if len(axes) != leaf.ndim:
        axes = ("",) * leaf.ndim  # of no family that is known: whole on every device
    return sharding_of(leaf.shape, axes, mesh)


def _bound(method: Method, hyperparameters: Mapping[str, Any]) -> Algorithm:
    if isinstance(method, str):
        return algorithm(method, **hyperparameters)
    if isinstance(method, Algorithm):
        return method.bind(**hyperparameters)
    if not callable(method):
        raise UserError(f"method must be a name, a function or an algorithm, not {method!r:.60}")
    return Algorithm.from_function(method, **hyperparameters)
