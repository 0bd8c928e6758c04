"""Watchdog of `sdjax run`: resumes a run that a program crashed or hung.

The launching process forks before it imports JAX. The child executes the command; this process
waits, passes signals on, and exits as the child does. If the child crashes or hangs in the merge of
a program, whatever XLA did there, the run is resumed in a new child, which refuses the program.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

from sdjax.isolation.confine import die_with
from sdjax.search.attempts import (
    CRASHES,
    attempt_seconds,
    make_attempt_the_last,
    pending_attempt,
)

_WAITED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGCHLD)
POLL_SECONDS = 1.0
TRUST_CODE = "--trust-code"


def watch_run() -> None:
    """Return in a child that executes the command; the calling process exits with its status.

    Runs of several processes are not watched: they must be resumed together.
    """
    folder = _run_folder(sys.argv[2:])
    # As in `sharding.multihost.start_distributed`, which needs JAX.
    distributed = "SDJAX_COORDINATOR" in os.environ or "," in os.environ.get(
        "TPU_WORKER_HOSTNAMES", ""
    )
    if folder is None or distributed or not hasattr(signal, "sigtimedwait"):
        return
    parent = os.getpid()
    while True:
        signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
        child = os.fork()
        if child == 0:
            die_with(parent)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _WAITED)
            return
        status, hung = _wait(child, folder)
        crashed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in CRASHES
        if not (hung or crashed) or not make_attempt_the_last(folder):
            _exit_like(status)
        how = "hung" if hung else "crashed"
        print(f"sdjax: the run {how} in a program; it resumes without it", file=sys.stderr)
        trusted = [argument for argument in sys.argv[2:] if argument == TRUST_CODE]
        sys.argv[2:] = ["--resume", str(folder), *trusted]


def _run_folder(arguments: list[str]) -> Path | None:
    """Return the folder in `--out DIR` or `--resume DIR`."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--out", "--resume"):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            return Path(value if equals else following)
    return None


def _wait(child: int, folder: Path) -> tuple[int, bool]:
    """Wait for the child; end it if it hangs. Return its wait status and whether it hung."""
    watched = left_over = pending_attempt(folder)  # by an earlier process
    since, hung = time.monotonic(), False
    while True:
        info = signal.sigtimedwait(_WAITED, POLL_SECONDS)
        # The terminal sends its signals to the child as well.
        if info is not None and info.si_signo != signal.SIGCHLD and info.si_code <= 0:
            os.kill(child, info.si_signo)
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid == child:
            return status, hung
        attempt = pending_attempt(folder)
        if attempt != watched:
            watched, since = attempt, time.monotonic()
            continue
        is_new = attempt not in (None, left_over)
        if is_new and not hung and time.monotonic() - since > attempt_seconds(folder):
            hung = True
            os.kill(child, signal.SIGKILL)


def _exit_like(status: int) -> None:
    """Exit with the status of the child, or by the signal that ended it."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number not in (signal.SIGKILL, signal.SIGSTOP):
            signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [number])
        os.kill(os.getpid(), number)
    os._exit(os.waitstatus_to_exitcode(status))
