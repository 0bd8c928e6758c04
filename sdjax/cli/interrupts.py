"""Handling of Ctrl-C and SIGTERM before, during and after a command, and exit of a process.

The entry point blocks both signals until `handle_signals`. Before a command runs there is nothing
to keep, so a signal exits at once; an exception would pass through half-initialized imports. While
it runs, the first signal raises KeyboardInterrupt, so that context managers close files and stop
workers. A second signal, or one while C++ code would not survive the exception, exits at once,
which loses nothing, because a killed command can be resumed, too. After the command, signals are
ignored.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

INTERRUPTED = 130  # exit status, as from a shell
_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_REPEAT_SECONDS = 0.05
# Modules in C++ abort if an exception interrupts their import. XLA compiles in a thread of its own,
# which reads an MLIR module that the exception would free. `importlib`, once imported, gives the
# first of these modules its second name.
NO_EXCEPTIONS = frozenset({"_frozen_importlib", "importlib._bootstrap", "jax._src.compiler"})


class Interrupted(Exception):
    """A command interrupted by Ctrl-C or SIGTERM."""

    def __init__(self, hint: str) -> None:
        """Store the message.

        Args:
            hint: how to resume the command, or "".
        """
        super().__init__(f"interrupted; {hint}" if hint else "interrupted")


class _State:
    """State of this process, which a signal handler cannot receive as an argument."""

    handled = False  # the handlers are installed
    running = False
    interrupted = False
    hint: Callable[[], str] | None = None
    last_signal = signal.SIGINT


def handle_signals() -> None:
    """Install the handlers and unblock the signals.

    Signals that this process was started to ignore remain ignored.
    """
    for number in _SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _handle)
    _State.handled = True
    sys.unraisablehook = _repeat_lost_interrupt
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def ignore_signals() -> None:
    """Ignore both signals, if this process handles them: nothing is left to interrupt.

    Python would otherwise restore their default actions when it exits.
    """
    if _State.handled:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def running_command() -> Iterator[None]:
    """Let the first signal raise in this block; every error after that is an interrupt.

    After the block there is nothing to interrupt, so signals are ignored.

    Raises:
        Interrupted: a signal arrived, even if a library has turned it into another exception.
    """
    _State.running, _State.interrupted, _State.hint = True, False, None
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt:
        raise Interrupted("") from None
    except Exception as error:
        if not _State.interrupted:
            raise
        raise Interrupted(_State.hint() if _State.hint else "") from error
    finally:
        ignore_signals()
        _State.running = False


@contextlib.contextmanager
def resume_hint(hint: str | Callable[[], str]) -> Iterator[None]:
    """Say what to do after an interrupt of this block.

    Args:
        hint: the advice, or a function that returns it when the block is interrupted.
    """
    outer = _State.hint
    _State.hint = (lambda: hint) if isinstance(hint, str) else hint
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(_State.hint()) from None
    finally:
        if not _State.interrupted:
            _State.hint = outer


def leave(status: int) -> NoReturn:
    """Exit without running destructors.

    XLA compiles in a thread of its own, which continues when an exception leaves a compilation.
    Destroying the client under it would end the process with a segmentation fault. Workers notice
    that this process is gone, and exit.
    """
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError, AttributeError):
            stream.flush()
    os._exit(status)


def _handle(number: int, frame: FrameType | None) -> None:
    if _State.running and not _State.interrupted and not _must_not_raise(frame):
        _State.interrupted, _State.last_signal = True, signal.Signals(number)
        raise KeyboardInterrupt
    error = Interrupted(_State.hint() if _State.hint else "")
    # Not through `sys.stderr`, which the interrupted code may be using. A terminal has printed
    # `^C`, and a progress bar that is still drawn has hidden the cursor.
    start = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{start}sdjax: {error}\n".encode())
    os._exit(INTERRUPTED)


def _must_not_raise(frame: FrameType | None) -> bool:
    """Return whether an exception in this frame could crash the process."""
    while frame is not None:
        if frame.f_globals.get("__name__") in NO_EXCEPTIONS:
            return True
        frame = frame.f_back
    return False


def _repeat_lost_interrupt(unraisable: sys.UnraisableHookArgs) -> None:
    """Send the signal again if it was raised where exceptions are lost, such as a destructor."""
    if not issubclass(unraisable.exc_type, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    _State.interrupted = False
    main_thread = threading.main_thread().ident
    assert main_thread is not None
    timer = threading.Timer(_REPEAT_SECONDS, signal.pthread_kill, (main_thread, _State.last_signal))
    timer.daemon = True
    timer.start()
