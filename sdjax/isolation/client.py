"""Parent-side handle of a fork server (`server.py`): starts it and connects to its workers."""

import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from json import dumps
from multiprocessing.connection import Connection

from sdjax.core.errors import UserError
from sdjax.isolation.confine import ENVIRONMENT, package_path
from sdjax.isolation.limits import WorkerLimits

WARM_UP_SECONDS = 120.0
_BOOT = (
    "import sys; sys.path[:0] = {paths!r}; from sdjax.isolation.server import main; main(*{args})"
)


class ForkServer:
    """Warm process that forks one confined child per request.

    Each of `connections` takes one request (bytes) and answers with a status byte of `server.py`,
    followed by the reply if the status is `DONE`. The reply is untrusted and has at most
    `limits.message_bytes` bytes. Call `confine.require_layers` before starting a server.

    Attributes:
        pid: process id of the warm process.
        connections: one connection per worker, each ready for a request.
    """

    def __init__(
        self,
        job: str,
        argument: str,
        limits: WorkerLimits,
        workers: int,
        allow_missing: Sequence[str] = (),
    ):
        """Start the server and wait until it is warm.

        Args:
            job: name of a module with a function `prepare(argument)` that returns the function
                from request to reply.
            argument: passed to `prepare`.
            limits: limits of each request.
            workers: number of requests that can run at the same time.
            allow_missing: layers of confinement that a worker may run without.

        Raises:
            UserError: the server did not start, usually because `job` cannot be imported.
        """
        pairs = [socket.socketpair() for _ in range(workers)]
        server_ends = [pair[1].fileno() for pair in pairs]
        arguments = (server_ends, job, argument, dumps(asdict(limits)), list(allow_missing))
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT.format(paths=package_path(), args=arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=server_ends,
            start_new_session=True,  # the parent handles Ctrl-C
        )
        for _, server_end in pairs:
            server_end.close()
        self.connections = tuple(Connection(own_end.detach()) for own_end, _ in pairs)
        try:
            self._await_warm_up(job)
        except BaseException:  # also Ctrl-C
            self._process.kill()  # a process that is not warm does not listen and has no workers
            raise

    @property
    def pid(self) -> int:
        """Process id of the warm process."""
        return self._process.pid

    def stop(self) -> None:
        """Stop the server and all its children."""
        for connection in self.connections:
            connection.close()
        try:  # the server reads end of file, kills its children and exits
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _await_warm_up(self, job: str) -> None:
        """Wait for the greeting of every dispatcher."""
        deadline = time.monotonic() + WARM_UP_SECONDS
        for connection in self.connections:
            try:
                if connection.poll(max(0.0, deadline - time.monotonic())):
                    connection.recv_bytes(16)
                    continue
            except (EOFError, OSError):
                pass
            raise UserError(f"the worker server did not start: check that `import {job}` works")
