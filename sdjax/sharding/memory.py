"""Memory of the devices, to reject sizes that cannot fit before anything is computed."""

from __future__ import annotations

import os

import jax

from sdjax.core.errors import UserError


def require_memory(num_bytes: int, what: str, *, num_devices: int, remedy: str) -> None:
    """Raise UserError if some arrays cannot fit, even if they are divided over all devices.

    Args:
        num_bytes: size of the arrays, or a lower bound of it.
        what: what needs them, as the subject of the message.
        num_devices: number of devices.
        remedy: what to do.
    """
    available = num_devices * _device_memory()
    if num_bytes > available:
        raise UserError(
            f"{what} requires {num_bytes / 1e9:,.1f} GB, but the memory has "
            f"{available / 1e9:,.1f} GB; {remedy}"
        )


def _device_memory() -> int:
    """Return the bytes of one device's memory; of the machine if the device does not tell."""
    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return int(stats["bytes_limit"])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
