"""Memory of the host that this process may use."""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path, PurePosixPath

_V2_FILE, _V1_FILE = "memory.max", "memory.limit_in_bytes"


@functools.cache
def host_memory() -> int:
    """Return the bytes of the host's memory, or the lower limit of a cgroup of this process.

    What other processes use at the moment does not count, so that the same command is refused or
    not whenever it runs.
    """
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([physical, *cgroup_limits(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))])


def cgroup_limits(membership: Path, root: Path) -> list[int]:
    """Return the limits on memory of the cgroups that a process is in, and of their parents.

    Args:
        membership: file that lists the cgroups of the process, one `ID:CONTROLLERS:PATH` per line;
            the line of cgroups v2 names no controllers.
        root: folder where cgroups are mounted.
    """
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return []
    limits = []
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        base, name = (root / "memory", _V1_FILE) if controllers else (root, _V2_FILE)
        # In a container, the path may be that of the host, of which only the root is mounted.
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                limits.append(int((base / folder / name).read_text()))
    return limits
