"""Entry point of `sdjax` and `python -m sdjax`."""

from __future__ import annotations

import sys

from sdjax.xla.allocator import collect_garbage_rarely, restart_with_huge_pages

_MEMORY_INTENSIVE = ("merge", "train")


def start() -> None:
    """Run the command line; merging and training run in a process with huge pages."""
    if sys.argv[1:2] and sys.argv[1] in _MEMORY_INTENSIVE:
        restart_with_huge_pages()
    collect_garbage_rarely()
    from sdjax.cli.main import main  # after the restart, which would discard the imports

    main()


if __name__ == "__main__":
    start()
