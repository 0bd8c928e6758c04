"""The fork server: a clean, warmed process that forks one confined child per text.

    ForkServer (parent, has the weights)
      └─ warm process: its job's modules imported, no secrets; forks and then only waits
           └─ one dispatcher per worker: forks a child as soon as a text is announced
                └─ a child per text: locks itself down, is then sent the text, works on it,
                   writes one message, ends

A dispatcher answers with one status byte and the child's message (untrusted bytes, capped). What
the work is, a job says: a module whose `prepare(argument)` warms the process up and returns the
function from text to message. The sandbox traces programs (tracer.py); the evaluation of
mathematics grades answers.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from sdjax.isolation.confine import adopt_orphans, confine, die_with, end_descendants
from sdjax.sandbox.signature import Limits

Work = Callable[[bytes], bytes]

DONE, OUT_OF_TIME, OUT_OF_CPU, DIED, TOO_LONG = b"D", b"T", b"C", b"X", b"L"


def main(
    descriptors: list[int], job: str, argument: str, limits_text: str, allow_missing: list[str]
) -> None:
    """Warm up, fork a dispatcher for every socket, and stay until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limits = Limits(**json.loads(limits_text))
    work = importlib.import_module(job).prepare(argument)
    gc.collect()
    gc.freeze()  # what is shared stays shared: no collection touches its pages
    gc.disable()
    here = os.getpid()
    for descriptor in descriptors:
        if os.fork() == 0:
            die_with(here)
            for other in descriptors:
                if other != descriptor:
                    os.close(other)
            serve(Connection(descriptor), work, limits, frozenset(allow_missing))
            os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    adopt_orphans()
    os.read(0, 1)  # the parent holds the other end: it closes it, or dies
    end_descendants()


def serve(
    connection: Connection, work: Work, limits: Limits, allow_missing: frozenset[str]
) -> None:
    """Greet, then answer the requests of one socket until its other end is closed."""
    connection.send_bytes(b"ready")
    while True:
        try:
            connection.poll(None)
            child, pipe = fork_worker(work, limits, allow_missing)
            try:
                text = connection.recv_bytes()
                with contextlib.suppress(OSError):  # it has ended: `_collect` finds out how
                    pipe.sendall(text)
                    pipe.shutdown(socket.SHUT_WR)
                status, output = _collect(pipe, connection, limits)
            finally:
                pipe.close()
                ended = end_worker(child)
            connection.send_bytes(_answer(status, output, ended))
        except (EOFError, OSError):
            return


def fork_worker(
    work: Work, limits: Limits, allow_missing: frozenset[str]
) -> tuple[int, socket.socket]:
    """A child that locks itself down, and the descriptor over which it waits for a text."""
    assert len(os.listdir("/proc/self/task")) == 1, "threads would not survive the fork"
    ours, theirs = socket.socketpair()
    here = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            die_with(here)
            missing = confine(theirs.detach(), limits)
            if os.getppid() == here and allow_missing.issuperset(missing):
                answer(3, work)
        finally:
            os._exit(1)
    theirs.close()
    return child, ours


def answer(pipe: int, work: Work) -> None:
    """In the child: read the text, work on it, write the message. Never returns."""
    data = work(b"".join(iter(lambda: os.read(pipe, 1 << 16), b"")))
    while data:
        data = data[os.write(pipe, data) :]
    os._exit(0)


def _collect(pipe: socket.socket, owner: Connection, limits: Limits) -> tuple[bytes, bytes]:
    """What a child writes until it ends, is late, writes too much, or is not wanted any more."""
    deadline, output = time.monotonic() + limits.wall_seconds, bytearray()
    while True:
        left = deadline - time.monotonic()
        ready, _, _ = select.select([pipe.fileno(), owner.fileno()], [], [], max(0.0, left))
        if not ready:
            return OUT_OF_TIME, b""
        if owner.fileno() in ready:  # requests come one at a time: this is the parent's end
            return DIED, b""
        try:
            chunk = pipe.recv(1 << 16)
        except ConnectionResetError:  # it ended without reading all that it was sent
            chunk = b""
        if not chunk:
            return DONE, bytes(output)
        output += chunk
        if len(output) > limits.ir_bytes:
            return TOO_LONG, b""


def _answer(status: bytes, output: bytes, ended: int) -> bytes:
    """One byte of status and, of a child that ended well, what it wrote."""
    if status == DONE and ended != 0:
        signalled = os.WIFSIGNALED(ended) and os.WTERMSIG(ended)
        return OUT_OF_CPU if signalled == signal.SIGXCPU else DIED
    return status + output


def end_worker(child: int) -> int:
    """End a child and all that it started; its status, that of its own end if it had come."""
    for end in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            end(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
