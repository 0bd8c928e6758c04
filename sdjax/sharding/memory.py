"""Memory of the devices, to refuse what cannot fit before it is allocated."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Collection, Iterator, MutableMapping
from typing import Any

import jax

from sdjax.core.errors import UserError
from sdjax.core.host_memory import host_memory


class MemoryLimitExceeded(UserError):
    """Raised when a computation needs more memory than there is, or than its caller allows."""


def memory_of(devices: Collection[jax.Device]) -> int:
    """Return the bytes of memory that some devices have together.

    A device that does not tell counts as its host, whose memory all devices of a CPU share. Devices
    of other hosts have as much as those of this host.
    """
    platform = next(iter(devices)).platform
    device = jax.local_devices(backend=platform)[0]
    stats = None if platform == "cpu" else device.memory_stats()
    if stats and "bytes_limit" in stats:
        return len(devices) * int(stats["bytes_limit"])
    return len({device.process_index for device in devices}) * host_memory()


def require_memory(num_bytes: int, what: str, *, num_devices: int, remedy: str) -> None:
    """Raise UserError if some arrays cannot fit, even if they are divided over all devices.

    Args:
        num_bytes: size of the arrays, or a lower bound of it.
        what: what needs them, as the subject of the message.
        num_devices: number of devices.
        remedy: what to do.
    """
    available = memory_of(jax.devices()[:num_devices])
    if num_bytes > available:
        raise UserError(
            f"{what} requires {num_bytes / 1e9:,.1f} GB, but the memory has "
            f"{available / 1e9:,.1f} GB; {remedy}"
        )


def memory_analysis(executable: jax.stages.Compiled) -> Any:
    """Return XLA's analysis of an executable, None if there is none.

    XLA makes it again for each call, which takes milliseconds, so it is kept.
    """
    if executable not in _analyses:
        _analyses[executable] = executable.memory_analysis()
    return _analyses[executable]


_analyses: MutableMapping[jax.stages.Compiled, Any] = weakref.WeakKeyDictionary()


def compiled_memory(executable: jax.stages.Compiled) -> int:
    """Return the bytes that an executable needs at once, on all of its devices together.

    They are those of its arguments, its results and its temporary arrays.
    """
    sizes = memory_analysis(executable)
    if sizes is None:
        return 0
    per_device = (
        sizes.argument_size_in_bytes
        + sizes.output_size_in_bytes
        - sizes.alias_size_in_bytes
        + sizes.temp_size_in_bytes
    )
    return len(devices_of(executable)) * per_device


def devices_of(executable: jax.stages.Compiled) -> Collection[jax.Device]:
    """Return the devices that an executable runs on."""
    return jax.tree.leaves(executable.output_shardings)[0].device_set


_FEWER_TENSORS = "merge fewer tensors or models, or use a machine with more memory"


def require_fit(
    executable: jax.stages.Compiled,
    what: str = "the compiled merge",
    *,
    remedy: str = _FEWER_TENSORS,
    resident: int = 0,
) -> None:
    """Check that an executable fits into the memory of its devices.

    Args:
        executable: the executable.
        what: what it computes, as the subject of the message.
        remedy: what to do.
        resident: bytes of arrays that stay on the devices and are not among its arguments.

    Raises:
        MemoryLimitExceeded: it needs more.
    """
    needed = compiled_memory(executable) + resident
    available = memory_of(devices_of(executable))
    if needed > available:
        raise MemoryLimitExceeded(f"{what} {shortage(needed, available)}; {remedy}")


def shortage(needed: int, available: int) -> str:
    """Return a description of a lack of memory, without a subject."""
    return (
        f"needs {needed / 1e9:,.3g} GB of memory at once, but the machine has "
        f"{available / 1e9:,.3g} GB"
    )


@contextlib.contextmanager
def exhaustion_reported(what: str = "the merge", *, remedy: str = _FEWER_TENSORS) -> Iterator[None]:
    """Raise MemoryLimitExceeded if XLA cannot allocate memory in this block.

    Args:
        what: what the block computes, as the subject of the message.
        remedy: what to do.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise MemoryLimitExceeded(f"{what} needs more memory than is free; {remedy}") from error
