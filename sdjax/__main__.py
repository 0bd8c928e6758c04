"""Entry point of `sdjax` and `python -m sdjax`."""

from __future__ import annotations

import sys

from sdjax.cli.interrupts import handle_signals, hold_signals, leave
from sdjax.cli.watchdog import watch_run
from sdjax.xla.allocator import collect_garbage_rarely, restart_with_huge_pages

_MEMORY_INTENSIVE = ("merge", "train")


def start() -> None:
    """Run the command line; merging and training run in a process with huge pages.

    A search runs in a child, which this process watches.
    """
    if sys.argv[1:2] and sys.argv[1] in _MEMORY_INTENSIVE:
        hold_signals()  # Python answers with a traceback while it starts
        restart_with_huge_pages()
    if sys.argv[1:2] == ["run"]:
        watch_run()
    handle_signals()
    collect_garbage_rarely()
    from sdjax.cli.main import main  # after the restart, which would discard the imports

    try:
        main()
    except SystemExit as error:
        if error.code:
            leave(int(error.code))


if __name__ == "__main__":
    start()
