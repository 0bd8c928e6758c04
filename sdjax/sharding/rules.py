"""From logical axes of a parameter to axes of the mesh.

The projections are split over `tensor` on the side of their heads or of the MLP, and over `fsdp`
on the side of the residual stream; `data` is for batches alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

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


class Spec(Protocol):
    """What the rules need of a parameter's specification (`sdjax.models.params.ParamSpec`)."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def axes(self) -> tuple[str, ...]: ...


def sharding_of(
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    mesh: Mesh,
    *,
    rules: Mapping[str, str] = RULES,
) -> NamedSharding:
    """The sharding of one array whose dimensions have these logical axes.

    A mesh axis is used only if the mesh has it, the dimension is divisible by it, and no earlier
    dimension took it; the dimension is whole on every device otherwise. A vector (the scale of a
    normalisation) is replicated: it costs nothing to keep and a collective to gather.
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
    """The tree of shardings of a tree of specifications, of the same structure.

    `shardings(unflatten(param_specs(config)), mesh)` belongs to the parameters of a model.
    """

    def one(spec: Spec) -> NamedSharding:
        return sharding_of(spec.shape, spec.axes, mesh, rules=rules)

    return jax.tree.map(one, specs)


def replicated(tree: Any) -> NamedSharding | None:
    """The sharding of an array that is whole on every device of the mesh that the tree is on.

    For what the host reads: a process cannot fetch what it has a part of. None off a mesh.
    """
    found = (getattr(leaf, "sharding", None) for leaf in jax.tree.leaves(tree))
    meshes = (sharding.mesh for sharding in found if isinstance(sharding, NamedSharding))
    return next((NamedSharding(mesh, PartitionSpec()) for mesh in meshes), None)


def batch_sharding(mesh: Mesh, batch: int) -> NamedSharding:
    """The sharding of an array [batch, ...] over `data`, replicated where that does not divide."""
    name = RULES["batch"]
    if name in mesh.shape and batch % mesh.shape[name] == 0:
        return NamedSharding(mesh, PartitionSpec(name))
    return NamedSharding(mesh, PartitionSpec())
