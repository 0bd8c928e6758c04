"""Options that choose devices, shared by the commands that decode without a config."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from sdjax.core.errors import UserError

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from sdjax.sharding.config import MeshConfig

mesh_option = click.option(
    "--mesh",
    metavar="AXIS=SIZE,…",
    help="Devices per axis: data, fsdp, tensor.  [default: all devices on tensor]",
)

dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    help="Of weights and activations.  [default: float32 on CPUs, bfloat16 elsewhere]",
)


def parse_mesh(text: str | None) -> MeshConfig | None:
    """Return the mesh of `--mesh`, such as "data=2,tensor=4"; None without the option.

    Raises:
        UserError: not a list of axes and sizes, or an unknown axis or invalid size.
    """
    if text is None:
        return None
    from sdjax.core.config import dataclass_from
    from sdjax.sharding.config import MeshConfig

    sizes: dict[str, int] = {}
    for part in text.split(","):
        axis, _, size = part.strip().partition("=")
        if axis in sizes:
            raise UserError(f"--mesh {text}: {axis} is already set; name it once")
        try:
            sizes[axis] = int(size)
        except ValueError:
            raise UserError(
                f"--mesh {text}: write AXIS=SIZE, such as data=2,tensor=4; -1 is the rest"
            ) from None
    return dataclass_from(MeshConfig, sizes, f"--mesh {text}")


def make_mesh(text: str | None) -> Mesh | None:
    """Return the mesh of `--mesh` over all devices; None for a single device.

    Raises:
        UserError: as `parse_mesh`, or sizes that do not match the devices.
    """
    from sdjax.sharding.config import MeshConfig

    try:
        return (parse_mesh(text) or MeshConfig()).make(default_axis="tensor")
    except UserError as error:
        raise UserError(str(error).replace("mesh:", "--mesh:", 1)) from None
