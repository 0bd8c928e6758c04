"""Workarounds for the memory allocator of glibc and the garbage collector of Python."""

from __future__ import annotations

import gc
import os
import sys

_VARIABLE = "GLIBC_TUNABLES"
# Freed memory is kept for the next tensor or step, as one arena of huge pages. Larger allocations
# than mmap_threshold are returned to the system: fragmentation would otherwise double them.
_TUNABLES = {"hugetlb": 1, "mmap_threshold": 2**32, "trim_threshold": 2**34, "arena_max": 1}


def restart_with_huge_pages() -> None:
    """Replace this process with one that allocates large arrays in huge pages, on Linux.

    Page faults take most of the system time of a large merge and a tenth of a training step. With
    pages of 2 MiB there are fewer of them. glibc reads its tunables only when a process starts. If
    `GLIBC_TUNABLES` is set already, nothing happens.
    """
    if sys.platform == "linux" and sys.executable and _VARIABLE not in os.environ:
        tunables = (f"glibc.malloc.{name}={value}" for name, value in _TUNABLES.items())
        os.environ[_VARIABLE] = ":".join(tunables)
        os.execv(sys.executable, sys.orig_argv)


def collect_garbage_rarely() -> None:
    """Raise the garbage-collection threshold; collection takes a fifth of the import time.

    Imports allocate hundreds of thousands of objects and hardly any garbage.
    """
    gc.set_threshold(50_000)
