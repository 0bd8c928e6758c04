"""What `sdjax` and `python -m sdjax` start."""

from __future__ import annotations

import os
import sys

# Most of a large merge's time in the system, and a tenth of a training step, goes into new pages of
# memory; they are asked for 2 MiB at a time. glibc reads this at its start.
_VARIABLE, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"
_LARGE = ("merge", "train")


def start() -> None:
    """Runs the command line; a merge or a training in a process of huge pages."""
    if sys.argv[1:2] and sys.argv[1] in _LARGE:
        in_huge_pages()
    from sdjax.cli import main  # not before a process that is given up at once

    main()


def in_huge_pages() -> None:
    """Begins this process anew, such that its large arrays lie in huge pages, where it can."""
    if sys.platform == "linux" and sys.executable and _VARIABLE not in os.environ:
        os.environ[_VARIABLE] = _HUGE_PAGES
        os.execv(sys.executable, sys.orig_argv)


if __name__ == "__main__":
    start()
