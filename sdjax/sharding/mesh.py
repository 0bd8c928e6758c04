"""The mesh of devices that a job runs on."""

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
    """A mesh with automatic axes, in the order `data`, `fsdp`, `tensor`.

    Axes are automatic, since free-form array code (sort, quantile, svd, `w @ w.T`) fails to trace
    under the explicit ones that `jax.make_mesh` gives by default.

    Args:
        sizes: axis to size, of some of the three axes; one size may be -1 and takes what is left.
            By default all devices are on `tensor`.
        devices: all devices of all processes by default.

    Raises:
        UserError: an unknown axis, or sizes that do not multiply to the number of devices.
    """
    sizes = {"tensor": -1} if sizes is None else dict(sizes)
    count = jax.device_count() if devices is None else len(devices)
    unknown = sorted(set(sizes) - set(AXES))
    if unknown or not sizes:
        raise UserError(
            f"mesh: unknown axis {', '.join(unknown)!r}; the axes are {', '.join(AXES)}"
            if unknown
            else f"mesh: no axis given; the axes are {', '.join(AXES)}"
        )
    shown = ", ".join(f"{axis}={size}" for axis, size in sizes.items())
    if sum(size == -1 for size in sizes.values()) > 1 or any(
        size < 1 and size != -1 for size in sizes.values()
    ):
        raise UserError(f"mesh: {shown}: sizes are 1 or more, and one of them may be -1")
    given = math.prod(size for size in sizes.values() if size != -1)
    whole = {axis: count // given if size == -1 else size for axis, size in sizes.items()}
    if math.prod(whole.values()) != count:
        raise UserError(
            f"mesh: {shown} does not cover {count} devices; "
            "make the sizes multiply to that, or set one of them to -1"
        )
    names = tuple(axis for axis in AXES if axis in whole)
    shape = tuple(whole[axis] for axis in names)
    types = (AxisType.Auto,) * len(names)
    if devices is not None and len(devices) == 1:
        return Mesh(np.array(devices).reshape(shape), names, axis_types=types)
    return jax.make_mesh(shape, names, axis_types=types, devices=devices)


def mesh_of_all(sizes: Mapping[str, int]) -> Mesh | None:
    """The mesh of these sizes over all devices; None for a single one, which needs no mesh.

    Raises:
        UserError: as `make_mesh`, for sizes that ask one device to be several too.
    """
    mesh = make_mesh(sizes)
    return mesh if mesh.size > 1 else None
