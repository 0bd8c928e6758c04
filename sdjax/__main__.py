"""Entry point of `sdjax` and `python -m sdjax`.

`start` blocks Ctrl-C and SIGTERM before it imports anything, so that they end the command in one
line as soon as their handlers are installed. Hence this module and `sdjax` import nothing.
"""

_MEMORY_INTENSIVE = ("merge", "train")
_WATCHED = ("run", "demo")


def start() -> None:
    """Run the command line; merging and training run in a process with huge pages.

    A search runs in a child, which this process watches.
    """
    import _signal  # the part in C, which is there already; `signal` would import others

    _signal.pthread_sigmask(_signal.SIG_BLOCK, (_signal.SIGINT, _signal.SIGTERM))
    import sys

    _leave_out_working_directory()
    from sdjax.cli.interrupts import handle_signals, ignore_signals, leave
    from sdjax.xla.allocator import collect_garbage_rarely, restart_with_huge_pages

    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in _MEMORY_INTENSIVE:
        restart_with_huge_pages()  # the signals stay blocked in the new process
    if command in _WATCHED:
        from sdjax.cli.watchdog import watch_run

        watch_run()
    handle_signals()
    collect_garbage_rarely()
    from sdjax.cli.main import main  # after the restart, which would discard the imports

    try:
        main()
    except SystemExit as error:
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
            leave(1)
        if error.code:
            leave(error.code)
    ignore_signals()


def _leave_out_working_directory() -> None:
    """Remove the working directory from `sys.path`, unless PYTHONPATH names it.

    `python -m` adds it, so that in a downloaded folder a `rich.py` there would be imported.
    """
    import os
    import sys

    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # it was removed
        return
    named = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    if here not in map(os.path.realpath, named):
        sys.path[:] = [entry for entry in sys.path if entry and os.path.realpath(entry) != here]


if __name__ == "__main__":
    start()
