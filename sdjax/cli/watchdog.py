"""Watchdog of `sdjax run` and `sdjax demo`: resumes a run that a program crashed or hung.

The launching process forks before it imports JAX. The child executes the command; this process
waits, passes signals on, and exits as the child does. If the child crashes or hangs in the merge of
a program, whatever XLA did there, the run is resumed in a new child, which refuses the program.
"""

from __future__ import annotations

import os
import signal
import sys
from datetime import datetime
from pathlib import Path

from sdjax.isolation.confine import die_with
from sdjax.search.attempts import (
    CRASHES,
    attempt_seconds,
    make_attempt_the_last,
    pending_attempt,
)

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_WAITED = (*_PASSED_ON, signal.SIGCHLD, signal.SIGALRM)
POLL_SECONDS = 1.0
TRUST_CODE = "--trust-code"


def watch_run() -> None:
    """Return in a child that executes the command; the calling process exits with its status.

    Runs of several processes are not watched: they must be resumed together. The new folder of a
    demo without `--out` is chosen here, since both processes must know it.
    """
    folder = _run_folder(sys.argv[2:])
    if folder is None and sys.argv[1] == "demo":
        folder = new_demo_folder()
        sys.argv[2:2] = ["--out", str(folder)]
    # As in `sharding.multihost.start_distributed`, which needs JAX.
    distributed = "SDJAX_COORDINATOR" in os.environ or "," in os.environ.get(
        "TPU_WORKER_HOSTNAMES", ""
    )
    if folder is None or distributed or not hasattr(signal, "sigwaitinfo"):
        return
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    while True:
        left_over = pending_attempt(folder)  # by an earlier process
        child = os.fork()
        if child == 0:
            die_with(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            return
        # Signals from before the fork. The child blocks them until it has handlers, so that one
        # that has reached it already counts once.
        for number in signal.sigpending() & set(_PASSED_ON):
            signal.sigwaitinfo([number])
            os.kill(child, number)
        status, hung = _wait(child, folder, left_over)
        crashed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in CRASHES
        if not (hung or crashed) or not make_attempt_the_last(folder):
            _exit_like(status)
        how = "hung" if hung else "crashed"
        print(f"sdjax: the run {how} in a program; it resumes without it", file=sys.stderr)
        trusted = [argument for argument in sys.argv[2:] if argument == TRUST_CODE]
        # The user's config or command line has allowed the limits, or no merge would have begun.
        sys.argv[1:] = ["run", "--resume", str(folder), "--trust-limits", *trusted]


def new_demo_folder() -> Path:
    """Return the folder of a demo without `--out`."""
    return Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"


def _run_folder(arguments: list[str]) -> Path | None:
    """Return the folder in `--out DIR` or `--resume DIR`."""
    for index, argument in enumerate(arguments):
        option, equals, value = argument.partition("=")
        if option in ("--out", "--resume"):
            following = arguments[index + 1] if index + 1 < len(arguments) else ""
            return Path(value if equals else following)
    return None


def _wait(child: int, folder: Path, left_over: tuple[str, str, int] | None) -> tuple[int, bool]:
    """Wait for the child; end it if it hangs.

    Args:
        child: the process that executes the command.
        folder: the run folder.
        left_over: the merge that was in progress before the child began.

    Returns:
        the child's wait status, and whether it hung.
    """
    watched = left_over
    seconds, stopped, hung = 0.0, False, False
    # Not `sigtimedwait`, which may return an undefined signal after this process was stopped.
    signal.setitimer(signal.ITIMER_REAL, POLL_SECONDS, POLL_SECONDS)
    while True:
        info = signal.sigwaitinfo(_WAITED)
        # The terminal sends its signals to the child as well.
        if info.si_signo in _PASSED_ON and info.si_code <= 0:
            os.kill(child, info.si_signo)
        pid, status = os.waitpid(child, os.WNOHANG | os.WUNTRACED | os.WCONTINUED)
        if pid == child:
            stopped = os.WIFSTOPPED(status)
            if not stopped and not os.WIFCONTINUED(status):
                signal.setitimer(signal.ITIMER_REAL, 0)
                return status, hung
        # Count alarms: a clock keeps running while Ctrl-Z stops this process.
        if info.si_signo == signal.SIGALRM and not stopped:
            seconds += POLL_SECONDS
        attempt = pending_attempt(folder)
        if attempt != watched:
            watched, seconds = attempt, 0.0
            continue
        is_new = attempt not in (None, left_over)
        if is_new and not hung and seconds > attempt_seconds(folder):
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
