"""What `sdjax` and `python -m sdjax` start."""

from __future__ import annotations

import gc
import os
import sys

# Most of a large merge's time in the system, and a tenth of a training step, goes into new pages of
# memory. They are asked for 2 MiB at a time, and what is freed is kept for the next tensor or step:
# pieces below 4 GiB, since one that finds its place taken in part would need another whole.
# glibc reads this at its start.
_VARIABLE = "GLIBC_TUNABLES"
_TUNABLES = {"hugetlb": 1, "mmap_threshold": 2**32, "trim_threshold": 2**34, "arena_max": 1}
_LARGE = ("merge", "train")


def start() -> None:
    """Runs the command line; a merge or a training in a process of huge pages."""
    if sys.argv[1:2] and sys.argv[1] in _LARGE:
        in_huge_pages()
    # Imports make objects by the hundred thousand and no garbage; looking for it takes a fifth of
    # the time that they take.
    gc.set_threshold(50_000)
    from sdjax.cli.main import main  # not before a process that is given up at once

    main()


def in_huge_pages() -> None:
    """Begins this process anew, such that its large arrays lie in huge pages, where it can."""
    if sys.platform == "linux" and sys.executable and _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = ":".join(f"glibc.malloc.{key}={n}" for key, n in _TUNABLES.items())
        os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    start()
