"""Watchdog of `sdjax run` and `sdjax demo`: resumes a run that a program crashed or hung.

The launching process forks before it imports JAX. The child executes the command; this process
waits, passes signals on, and exits as the child does. If the child crashes or hangs in the merge of
a program, whatever XLA did there, the run is resumed in a new child, which refuses the program.

A run of several processes must be resumed by all of them, so it is only ended: the main process is
killed, JAX ends the others, and the program is refused when the run is started again. Only the main
process may read the store, whose file system need not support SQLite on several hosts, and only the
child knows whether it is that process, after it has joined the others (`report_role`).
"""

from __future__ import annotations

import contextlib
import os
import shlex
import signal
import sys
from datetime import datetime
from pathlib import Path

from sdjax.core.visible import escape
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
_MAIN, _OTHER = b"+", b"-"
_role_pipe: int | None = None  # in the child: where it reports its role


def watch_run() -> None:
    """Return in a child that executes the command; the calling process exits with its status.

    The new folder of a demo without `--out` is chosen here, since both processes must know it.
    """
    global _role_pipe
    folder = _run_folder(sys.argv[2:])
    if folder is None and sys.argv[1] == "demo":
        folder = new_demo_folder()
        sys.argv[2:2] = ["--out", str(folder)]
    # As in `sharding.multihost.start_distributed`, which needs JAX.
    distributed = "SDJAX_COORDINATOR" in os.environ or "," in os.environ.get(
        "TPU_WORKER_HOSTNAMES", ""
    )
    if folder is None or not hasattr(signal, "sigwaitinfo"):
        return
    role, write_end = os.pipe()
    os.set_blocking(role, False)
    parent = os.getpid()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED)
    while True:
        watched = _Watched(folder, role if distributed else None)
        child = os.fork()
        if child == 0:
            die_with(parent)
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
            _role_pipe = write_end
            return
        # Signals from before the fork. The child blocks them until it has handlers, so that one
        # that has reached it already counts once.
        for number in signal.sigpending() & set(_PASSED_ON):
            signal.sigwaitinfo([number])
            os.kill(child, number)
        status, hung = _wait(child, watched)
        # JAX aborts this process when another one has died, for whatever reason.
        own = [number for number in CRASHES if not (distributed and number == signal.SIGABRT)]
        crashed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in own
        if not (hung or crashed) or not watched.is_main or not make_attempt_the_last(folder):
            _exit_like(status)
        how = "hung" if hung else "crashed"
        if distributed:
            command = escape(shlex.join(["sdjax", "run", "--resume", str(folder)]))
            remedy = f"start `{command}` on all processes, which refuses it"
            print(f"sdjax: the run {how} in a program; {remedy}", file=sys.stderr, flush=True)
            _exit_like(status)
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


def report_role(*, is_main: bool) -> None:
    """Tell the watchdog, if there is one, whether this is the main process of the run."""
    if _role_pipe is not None:
        os.write(_role_pipe, _MAIN if is_main else _OTHER)


class _Watched:
    """State of the child, as far as this process may read the run's store.

    Attributes:
        folder: the run folder.
        is_main: whether the child is the main process of its run.
        left_over: the merge that an earlier process had begun and not ended.
    """

    def __init__(self, folder: Path, role: int | None) -> None:
        """Describe a child that has not begun.

        Args:
            folder: the run folder.
            role: pipe in which the child will report its role; None if it is the only process.
        """
        self.folder, self._role = folder, role
        self.is_main = role is None
        self.left_over = pending_attempt(folder) if self.is_main else None

    def pending_attempt(self) -> tuple[str, str, int] | None:
        """Return the merge in progress; None on a process that must not read the store."""
        if self._role is not None and not self.is_main:
            with contextlib.suppress(BlockingIOError):  # it has not joined the others yet
                self.is_main = _MAIN in os.read(self._role, 1 << 10)
            if self.is_main:
                self.left_over = pending_attempt(self.folder)
        return pending_attempt(self.folder) if self.is_main else None


def _wait(child: int, watched: _Watched) -> tuple[int, bool]:
    """Wait for the child; end it if it hangs.

    Args:
        child: its process id.
        watched: what it does.

    Returns:
        the child's wait status, and whether it hung.
    """
    current = watched.left_over
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
        attempt = watched.pending_attempt()
        if attempt != current:
            current, seconds = attempt, 0.0
            continue
        is_new = attempt not in (None, watched.left_over)
        if is_new and not hung and seconds > attempt_seconds(watched.folder):
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
