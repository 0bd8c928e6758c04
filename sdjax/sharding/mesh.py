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

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

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
        if count == 1:
            problem = "does not match 1 device; leave the mesh out"
        else:
            problem = (
                f"does not match {count} devices; make the product of the sizes {count}, or set "
                "one size to -1 for the remaining devices"
            )
        raise UserError(f"mesh: {listed} {problem}")
    names = tuple(axis for axis in AXES if axis in resolved)
    shape = tuple(resolved[axis] for axis in names)
    types = (AxisType.Auto,) * len(names)
    if devices is not None and len(devices) == 1:
        return Mesh(np.array(devices).reshape(shape), names, axis_types=types)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)
