"""Sharding rules: logical axes of parameters mapped to mesh axes.

Projections are split over `tensor` on the side of the heads or of the MLP, and over `fsdp` on the
side of the residual stream. Only batches are split over `data`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str] = {
    "vocab": "tensor",
    "heads": "tensor",
    "kv_heads": "tensor",
    "query_key_value": "tensor",
    "intermediate": "tensor",
    "gate_and_up": "tensor",
    "hidden": "fsdp",
    "batch": "data",
}


def sharding_of(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    mesh: Mesh,
    *,
    rules: Mapping[str, str] = RULES,
) -> NamedSharding:
    """Return the sharding of one array.

    A dimension is split over its mesh axis if the mesh has that axis, its size divides the
    dimension, and no earlier dimension uses it; otherwise it is replicated. Vectors (the scales of
    norms) are replicated: they are small, and gathering them would cost a collective.

    Args:
        shape: shape of the array.
        axes: logical axis of each dimension.
        mesh: the mesh.
        rules: logical axis to mesh axis.
    """
    if len(shape) < 2:
        return NamedSharding(mesh, PartitionSpec())
    parts: list[str | None] = []
    for size, axis in zip(shape, axes, strict=True):
        name = rules.get(axis)
        usable = name in mesh.shape and name not in parts and size % mesh.shape[name] == 0
        parts.append(name if usable else None)
    return NamedSharding(mesh, PartitionSpec(*parts))


def shardings(specs: Any, mesh: Mesh, *, rules: Mapping[str, str] = RULES) -> Any:
    """Return the shardings of a tree of specifications, as a tree of the same structure.

    `shardings(unflatten(param_specs(config)), mesh)` are the shardings of a model's parameters.
    """
    return jax.tree.map(lambda spec: sharding_of(spec.shape, spec.axes, mesh, rules=rules), specs)


def replicated(tree: Any) -> NamedSharding | None:
    """Return the replicated sharding on the mesh of a tree's arrays, or None without a mesh.

    Results that the host reads must be replicated, since a process cannot fetch the shards of
    other processes.
    """
    leaf_shardings = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = (item.mesh for item in leaf_shardings if isinstance(item, NamedSharding))
    return next((NamedSharding(mesh, PartitionSpec()) for mesh in meshes), None)


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """Return the sharding of an array [batch, ...] over `data`; replicated if not divisible."""
    name = RULES["batch"]
    if name in mesh.shape and batch % mesh.shape[name] == 0:
        return NamedSharding(mesh, PartitionSpec(name))
    return NamedSharding(mesh, PartitionSpec())
