"""Requests to the workers of a fork server, repeated if a worker or the server was lost."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait

from sdjax.isolation.client import ForkServer, Job
from sdjax.isolation.server import DIED, NOT_STARTED, OUT_OF_TIME


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request to a worker.

    Attributes:
        job: number of the job.
        key: name under which the reply is returned.
        data: the request.
        is_retry: whether it was sent before.
    """

    job: int
    key: object
    data: bytes
    is_retry: bool = False


@dataclass(frozen=True, kw_only=True)
class Reply:
    """A reply: the key of its request, a status of `server.py`, and untrusted bytes if DONE."""

    key: object
    status: bytes
    data: bytes = b""


class WorkerPool:
    """Sends requests to the workers of a fork server.

    A request is repeated once, while no other worker is busy, after a timeout by the wall clock,
    the loss of the server, or the death of a worker that serves several requests: the machine may
    have been busy or short of memory.

    Attributes:
        jobs: what the workers do.
        pid: process id of the fork server; None if it is not running.
    """

    def __init__(self, jobs: Sequence[Job], allow_missing: Sequence[str] = ()):
        """Prepare a pool; see `ForkServer` for the arguments."""
        self.jobs, self._allow_missing = tuple(jobs), tuple(allow_missing)
        self._server: ForkServer | None = None
        self._idle: list[list[Connection]] = [[] for _ in self.jobs]
        self._busy: dict[Connection, Request] = {}

    @property
    def pid(self) -> int | None:
        """Process id of the fork server."""
        return None if self._server is None else self._server.pid

    @property
    def busy(self) -> bool:
        """Whether a reply is pending."""
        return bool(self._busy)

    def idle(self, job: int) -> int:
        """Return the number of idle workers of a job."""
        return len(self._idle[job])

    def start(self) -> None:
        """Start the server unless it is running."""
        if self._server is None:
            self._server = ForkServer(self.jobs, self._allow_missing)
            self._idle = [list(group) for group in self._server.connections]

    def stop(self) -> None:
        """Stop all processes and forget all requests."""
        server, self._server = self._server, None
        self._idle, self._busy = [[] for _ in self.jobs], {}
        if server is not None:
            server.stop()

    def submit(self, request: Request) -> None:
        """Send a request to an idle worker of its job."""
        connection = self._idle[request.job].pop()
        self._busy[connection] = request
        with contextlib.suppress(OSError):  # the dispatcher is gone; `collect` will notice
            connection.send_bytes(request.data)

    def collect(self) -> list[Reply]:
        """Wait for at least one reply."""
        replies, retries = self._receive()

        def drain() -> None:
            while self._busy:
                others, more = self._receive()
                replies.extend(others)
                retries.extend(more)  # the loop below reaches them, too

        for request in retries:
            drain()
            self.submit(replace(request, is_retry=True))
            drain()
        return replies

    def _receive(self) -> tuple[list[Reply], list[Request]]:
        """Wait for a worker; return the replies, and the requests to repeat."""
        patience = max(4 * job.limits.wall_seconds for job in self.jobs) + 10
        ready = wait(list(self._busy), timeout=patience)
        replies: list[Reply] = []
        retries: list[Request] = []
        lost = not ready
        for connection in ready:
            assert isinstance(connection, Connection)
            request = self._busy[connection]
            limits = self.jobs[request.job].limits
            try:
                data = connection.recv_bytes(limits.message_bytes + 1)
            except (EOFError, OSError):
                lost = True
                continue
            del self._busy[connection]
            self._idle[request.job].append(connection)
            status = data[:1]
            repeat = (OUT_OF_TIME,) if limits.requests == 1 else (OUT_OF_TIME, DIED, NOT_STARTED)
            if status in repeat and not request.is_retry:
                retries.append(request)
            else:
                replies.append(Reply(key=request.key, status=status, data=data[1:]))
        if lost:  # a dispatcher was killed, by a candidate or for lack of memory
            unanswered = list(self._busy.values())
            self.stop()
            retries += [request for request in unanswered if not request.is_retry]
            replies += [Reply(key=r.key, status=DIED) for r in unanswered if r.is_retry]
            self.start()
        return replies, retries
