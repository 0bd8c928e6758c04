"""Fork server: a clean, warm process that forks confined children for the requests of its jobs.

    ForkServer (client.py, in the parent)
      └─ warm process: imports the jobs' modules, holds no secrets, forks dispatchers, then waits
           └─ one dispatcher per worker: forks a child as soon as a request is announced
                └─ child (child.py): confines itself, then reads a request, processes it and writes
                   one reply, until it has served `WorkerLimits.requests`

A dispatcher answers with one status byte and the child's reply (untrusted bytes of bounded size).
A job is a module whose `prepare(argument)` warms the process up and returns the function from
request to reply. Its function `start`, if there is one, runs in each child; see `confine`.
"""

import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import sys
import time
from multiprocessing.connection import Connection

from sdjax.isolation.child import HEADER_BYTES, ChildJob, frame, run
from sdjax.isolation.confine import adopt_orphans, die_with, end_descendants
from sdjax.isolation.limits import WorkerLimits

DONE, OUT_OF_TIME, OUT_OF_CPU, DIED, TOO_LONG = b"D", b"T", b"C", b"X", b"L"
NOT_STARTED = b"N"  # the child exited before it was confined, as if a layer is missing

_CPU_POLL_SECONDS = 0.02
_CPUCLOCK_SCHED = 2  # kernel's name; with a process id, the clock of another process


def main(descriptors: list[list[int]]) -> None:
    """Warm up, fork one dispatcher per socket, and run until standard input is closed.

    Args:
        descriptors: for each job, the sockets of its dispatchers.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = json.loads(sys.stdin.buffer.readline())
    jobs = []
    for module_name, argument, limits in config["jobs"]:
        module = importlib.import_module(module_name)
        work, start = module.prepare(argument), getattr(module, "start", lambda: None)
        allow_missing = frozenset(config["allow_missing"])
        limits = WorkerLimits(**limits)
        jobs.append(ChildJob(work=work, start=start, limits=limits, allow_missing=allow_missing))
    gc.collect()
    gc.freeze()  # a collection in a child would copy the shared pages
    gc.disable()
    server_pid = os.getpid()
    every = [descriptor for group in descriptors for descriptor in group]
    for job, group in zip(jobs, descriptors, strict=True):
        for descriptor in group:
            if os.fork() == 0:
                die_with(server_pid)
                for unused in every:
                    if unused != descriptor:
                        os.close(unused)
                serve(Connection(descriptor), job)
                os._exit(0)
    for descriptor in every:
        os.close(descriptor)
    adopt_orphans()
    os.read(0, 1)  # returns when the parent closes its end or dies
    end_descendants()


def serve(connection: Connection, job: ChildJob) -> None:
    """Send a greeting, then answer the requests of one socket until the parent closes it."""
    connection.send_bytes(b"ready")
    child: Child | None = None
    try:
        while True:
            connection.poll(None)
            child = child or Child(job)
            request = connection.recv_bytes()
            status, reply = child.ask(request, connection)
            if status == DIED and child.served > 0:  # an earlier request may be the cause
                child.end()
                child = Child(job)
                status, reply = child.ask(request, connection)
            if status != DONE or child.served == job.limits.requests:
                child.end()
                child = None
            connection.send_bytes(status + reply)
    except (EOFError, OSError):
        return
    finally:
        if child is not None:
            child.end()


class Child:
    """Dispatcher's view of a confined child.

    Attributes:
        served: number of requests that it has answered.
    """

    def __init__(self, job: ChildJob) -> None:
        """Fork a child that confines itself and waits for a request."""
        assert len(os.listdir("/proc/self/task")) == 1, "threads do not survive a fork"
        self.served = 0
        self._limits, self._started = job.limits, False
        self._pipe, child_end = socket.socketpair()
        parent_pid = os.getpid()
        self._pid = os.fork()
        if self._pid == 0:
            try:
                die_with(parent_pid)
                run(child_end.detach(), parent_pid, job)
            finally:
                os._exit(1)
        child_end.close()
        self._pipe.settimeout(job.limits.wall_seconds)

    def ask(self, request: bytes, parent: Connection) -> tuple[bytes, bytes]:
        """Send a request and return a status, and the reply if the status is DONE."""
        if not self._started:
            status, _ = self._receive(parent)
            if status != DONE:  # a busy machine is not a missing layer
                return (NOT_STARTED if status == DIED else status), b""
            self._started = True
        with contextlib.suppress(OSError):  # the child has died; `_receive` reports how
            self._pipe.sendall(frame(request))
        status, reply = self._receive(parent)
        self.served += status == DONE
        return status, reply

    def end(self) -> int:
        """Kill the child with its process group and return its wait status."""
        self._pipe.close()
        pid, self._pid = self._pid, 0
        if pid == 0:
            return 0
        for kill in (os.killpg, os.kill):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                kill(pid, signal.SIGKILL)
        return os.waitpid(pid, 0)[1]

    def _receive(self, parent: Connection) -> tuple[bytes, bytes]:
        """Read one frame until the child exits, a limit is reached, or the parent hangs up."""
        limits, data = self._limits, bytearray()
        deadline = time.monotonic() + limits.wall_seconds
        cpu_deadline = self._cpu_seconds() + limits.cpu_seconds
        while True:
            remaining, cpu = deadline - time.monotonic(), cpu_deadline - self._cpu_seconds()
            if remaining <= 0:
                return OUT_OF_TIME, b""
            if cpu <= 0:
                return OUT_OF_CPU, b""
            # All cores may work for the child.
            timeout = min(remaining, max(cpu / (os.cpu_count() or 1), _CPU_POLL_SECONDS))
            ready, _, _ = select.select([self._pipe.fileno(), parent.fileno()], [], [], timeout)
            if parent.fileno() in ready:  # requests come one at a time, so the parent has closed it
                return DIED, b""
            if not ready:
                continue
            try:
                chunk = self._pipe.recv(1 << 16)
            except ConnectionResetError:  # the child exited before it had read the whole request
                chunk = b""
            if not chunk:
                status = self.end()
                killed_by = os.WIFSIGNALED(status) and os.WTERMSIG(status)
                return OUT_OF_CPU if killed_by == signal.SIGXCPU else DIED, b""
            data += chunk
            if len(data) < HEADER_BYTES:
                continue
            size = int.from_bytes(data[:HEADER_BYTES], "little")
            if size > limits.message_bytes:
                return TOO_LONG, b""
            if len(data) >= HEADER_BYTES + size:
                return DONE, bytes(data[HEADER_BYTES : HEADER_BYTES + size])

    def _cpu_seconds(self) -> float:
        """Return the processor time of the child, with all of its threads."""
        try:
            return time.clock_gettime((~self._pid << 3) | _CPUCLOCK_SCHED)
        except OSError:  # it has exited, which `recv` reports
            return 0.0
