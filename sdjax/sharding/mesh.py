"""The device mesh of a job.

| axis | what is sharded over it |
|---|---|
| data | batches |
| fsdp | parameters, along the residual stream dimension |
| tensor | parameters, along the attention heads or the MLP's hidden dimension |
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated

import jax
import numpy as np
from jax.sharding import AxisType, Mesh
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT
from sdjax.core.errors import UserError

AXES = ("data", "fsdp", "tensor")


def make_mesh(
    sizes: Mapping[str, int] | None = None, *, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """Create a mesh with automatic axes, in the order `data`, `fsdp`, `tensor`.

    Axes are automatic, since free-form array code (sort, quantile, svd, `w @ w.T`) fails to trace
    under the explicit axes that `jax.make_mesh` uses by default.

    Args:
        sizes: axis to size, for some of the three axes. One size may be -1, for the remaining
            devices. By default all devices are on `tensor`.
        devices: the devices; all devices of all processes by default.

    Raises:
        UserError: an unknown axis, or sizes whose product is not the number of devices.
    """
    sizes = {"tensor": -1} if sizes is None else dict(sizes)
    count = jax.device_count() if devices is None else len(devices)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown or not sizes:
        problem = f"unknown axis {', '.join(unknown)!r}" if unknown else "no axis given"
        raise UserError(f"mesh: {problem}; the axes are {', '.join(AXES)}")
    listed = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if sum(size == -1 for size in sizes.values()) > 1 or any(
        size < 1 and size != -1 for size in sizes.values()
    ):
        raise UserError(f"mesh: {listed}: every size must be 1 or more; one of them may be -1")
    known = math.prod(size for size in sizes.values() if size != -1)
    resolved = {axis: count // known if size == -1 else size for axis, size in sizes.items()}
    if math.prod(resolved.values()) != count:
        raise UserError(
            f"mesh: {listed} does not match {count} devices; "
            "make the product of the sizes that number, or set one size to -1"
        )
    names = tuple(axis for axis in AXES if axis in resolved)
    shape = tuple(resolved[axis] for axis in names)
    types = (AxisType.Auto,) * len(names)
    if devices is not None and len(devices) == 1:
        return Mesh(np.array(devices).reshape(shape), names, axis_types=types)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


def _check_axis_size(size: int) -> int:
    if size == 0:
        raise ValueError("must be 1 or more, or -1 for the remaining devices")
    return size


AxisSize = Annotated[int, Field(ge=-1), AfterValidator(_check_axis_size)]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class MeshConfig:
    """Config section of a mesh: the number of devices along each axis.

    Attributes:
        data: size of the axis of batches.
        fsdp: size of the axis that splits parameters along the residual stream.
        tensor: size of the axis that splits parameters along heads and MLP.

    A size of -1 means all remaining devices.
    """

    data: AxisSize | None = None
    fsdp: AxisSize | None = None
    tensor: AxisSize | None = None

    def make(self, *, default_axis: str) -> Mesh | None:
        """Create the mesh over all devices, or return None for a single device.

        Args:
            default_axis: the axis of the remaining devices, if the config sets neither its size
                nor another one to -1. Other axes without a size have size 1.

        Raises:
            UserError: sizes whose product is not the number of devices.
        """
        sizes = {axis: getattr(self, axis) for axis in AXES}
        remaining = 1 if -1 in sizes.values() else -1
        sizes = {
            axis: size or (remaining if axis == default_axis else 1) for axis, size in sizes.items()
        }
        mesh = make_mesh(sizes)
        return mesh if mesh.size > 1 else None
