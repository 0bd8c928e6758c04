"""Fork server: a clean, warm process that forks one confined child per request.

    ForkServer (client.py, in the parent)
      └─ warm process: imports the job's modules, holds no secrets, forks dispatchers, then waits
           └─ one dispatcher per worker: forks a child as soon as a request is announced
                └─ one child per request: confines itself, then reads the request, processes it,
                   writes one reply and exits

A dispatcher answers with one status byte and the child's reply (untrusted bytes of bounded size).
The job is a module whose `prepare(argument)` warms the process up and returns the function from
request to reply.
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
from sdjax.isolation.limits import WorkerLimits

Work = Callable[[bytes], bytes]

DONE, OUT_OF_TIME, OUT_OF_CPU, DIED, TOO_LONG = b"D", b"T", b"C", b"X", b"L"


def main(
    descriptors: list[int], job: str, argument: str, limits_json: str, allow_missing: list[str]
) -> None:
    """Warm up, fork one dispatcher per socket, and run until standard input is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    limits = WorkerLimits(**json.loads(limits_json))
    work = importlib.import_module(job).prepare(argument)
    gc.collect()
    gc.freeze()  # a collection in a child would copy the shared pages
    gc.disable()
    server_pid = os.getpid()
    for descriptor in descriptors:
        if os.fork() == 0:
            die_with(server_pid)
            for unused in descriptors:
                if unused != descriptor:
                    os.close(unused)
            serve(Connection(descriptor), work, limits, frozenset(allow_missing))
            os._exit(0)
    for descriptor in descriptors:
        os.close(descriptor)
    adopt_orphans()
    os.read(0, 1)  # returns when the parent closes its end or dies
    end_descendants()


def serve(
    connection: Connection, work: Work, limits: WorkerLimits, allow_missing: frozenset[str]
) -> None:
    """Send a greeting, then answer the requests of one socket until the parent closes it."""
    connection.send_bytes(b"ready")
    while True:
        try:
            connection.poll(None)
            child, pipe = fork_worker(work, limits, allow_missing)
            try:
                request = connection.recv_bytes()
                with contextlib.suppress(OSError):  # the child has died; `_collect` reports how
                    pipe.sendall(request)
                    pipe.shutdown(socket.SHUT_WR)
                status, reply = _collect(pipe, connection, limits)
            finally:
                pipe.close()
                wait_status = end_worker(child)
            connection.send_bytes(_answer(status, reply, wait_status))
        except (EOFError, OSError):
            return


def fork_worker(
    work: Work, limits: WorkerLimits, allow_missing: frozenset[str]
) -> tuple[int, socket.socket]:
    """Fork a child that confines itself and waits for a request.

    Returns:
        the child's process id and the socket connected to it.
    """
    assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
    parent_end, child_end = socket.socketpair()
    parent_pid = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            die_with(parent_pid)
            missing = confine(child_end.detach(), limits)
            if os.getppid() == parent_pid and allow_missing.issuperset(missing):
                answer(3, work)
        finally:
            os._exit(1)
    child_end.close()
    return child, parent_end


def answer(pipe: int, work: Work) -> None:
    """Read the request, process it, write the reply and exit. Runs in the child."""
    reply = work(b"".join(iter(lambda: os.read(pipe, 1 << 16), b"")))
    while reply:
        reply = reply[os.write(pipe, reply) :]
    os._exit(0)


def _collect(pipe: socket.socket, parent: Connection, limits: WorkerLimits) -> tuple[bytes, bytes]:
    """Read a child's reply until the child exits, a limit is reached, or the parent hangs up."""
    deadline, reply = time.monotonic() + limits.wall_seconds, bytearray()
    while True:
        remaining = max(0.0, deadline - time.monotonic())
        ready, _, _ = select.select([pipe.fileno(), parent.fileno()], [], [], remaining)
        if not ready:
            return OUT_OF_TIME, b""
        if parent.fileno() in ready:  # requests come one at a time, so the parent has closed it
            return DIED, b""
        try:
            chunk = pipe.recv(1 << 16)
        except ConnectionResetError:  # the child exited before it had read the whole request
            chunk = b""
        if not chunk:
            return DONE, bytes(reply)
        reply += chunk
        if len(reply) > limits.message_bytes:
            return TOO_LONG, b""


def _answer(status: bytes, reply: bytes, wait_status: int) -> bytes:
    """Return the status byte, followed by the reply if the child exited normally."""
    if status == DONE and wait_status != 0:
        signal_number = os.WIFSIGNALED(wait_status) and os.WTERMSIG(wait_status)
        return OUT_OF_CPU if signal_number == signal.SIGXCPU else DIED
    return status + reply


def end_worker(child: int) -> int:
    """Kill a child with its process group and return its wait status."""
    for kill in (os.killpg, os.kill):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(child, signal.SIGKILL)
    return os.waitpid(child, 0)[1]
