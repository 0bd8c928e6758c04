"""What `sdjax` and `python -m sdjax` start."""

from __future__ import annotations

import os
import sys

from sdjax.cli import main

# Most of a large merge's time in the system goes into new pages of memory; asked for 2 MiB at a
# time, a merge of 1.1B parameters takes two thirds of the time. glibc reads this at its start.
_VARIABLE, _HUGE_PAGES = "GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"


def start() -> None:
    """Runs the command line; a merge in a process whose large arrays lie in huge pages."""
    if (
        sys.argv[1:2] == ["merge"]
        and sys.platform == "linux"
        and sys.executable
        and _VARIABLE not in os.environ
    ):
        os.environ[_VARIABLE] = _HUGE_PAGES
        os.execv(sys.executable, sys.orig_argv)
    main()


if __name__ == "__main__":
    start()
