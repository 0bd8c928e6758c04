"""The mesh section of runs and training jobs."""

from __future__ import annotations

from typing import Annotated

from jax.sharding import Mesh
from pydantic import AfterValidator, Field
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT
from sdjax.sharding.mesh import AXES, make_mesh


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
