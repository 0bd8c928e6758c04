"""Parent-side handle of a fork server (`server.py`): starts it and connects to its workers."""

import contextlib
import json
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection

from sdjax.core.errors import UserError
from sdjax.isolation.confine import ENVIRONMENT, package_path
from sdjax.isolation.limits import WorkerLimits

WARM_UP_SECONDS = 120.0
_BOOT = (
    "import sys; sys.path[:0] = {paths!r}; from sdjax.isolation.server import main; main({groups})"
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Work that a fork server does.

    Attributes:
        module: name of a module with a function `prepare(argument)` that returns the function from
            request to reply, and possibly a function `start()`; see `confine`.
        argument: passed to `prepare`.
        limits: limits of the workers and of each request.
        workers: number of requests that can run at the same time.
    """

    module: str
    argument: str = ""
    limits: WorkerLimits
    workers: int = 1


class ForkServer:
    """Warm process that forks confined children for the requests of its jobs.

    Each of `connections` takes one request (bytes) and answers with a status byte of `server.py`,
    followed by the reply if the status is `DONE`. The reply is untrusted and has at most
    `limits.message_bytes` bytes. Call `confine.require_layers` before starting a server.

    Attributes:
        connections: for each job, one connection per worker, each ready for a request.
    """

    def __init__(self, jobs: Sequence[Job], allow_missing: Sequence[str] = ()):
        """Start the server and wait until it is warm.

        Args:
            jobs: what the workers do.
            allow_missing: layers of confinement that a worker may run without.

        Raises:
            UserError: the server did not start, usually because a module cannot be imported.
        """
        pairs = [[socket.socketpair() for _ in range(job.workers)] for job in jobs]
        groups = [[server_end.fileno() for _, server_end in group] for group in pairs]
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", _BOOT.format(paths=package_path(), groups=groups)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=[descriptor for group in groups for descriptor in group],
            start_new_session=True,  # the parent handles Ctrl-C
        )
        for _, server_end in (pair for group in pairs for pair in group):
            server_end.close()
        self.connections = tuple(
            tuple(Connection(own_end.detach()) for own_end, _ in group) for group in pairs
        )
        try:
            self._send_config(jobs, allow_missing)
            self._await_warm_up([job.module for job in jobs])
        except BaseException:  # also Ctrl-C
            self._process.kill()  # it does not listen before it is warm; dispatchers die with it
            self.stop()
            raise

    @property
    def pid(self) -> int:
        """Process id of the warm process."""
        return self._process.pid

    def stop(self) -> None:
        """Stop the server and all its children."""
        for connection in (one for group in self.connections for one in group):
            connection.close()
        try:  # the server reads end of file, kills its children and exits
            self._process.communicate(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send_config(self, jobs: Sequence[Job], allow_missing: Sequence[str]) -> None:
        """Send the jobs over standard input: a command line may be too short for an argument."""
        described = [[job.module, job.argument, asdict(job.limits)] for job in jobs]
        config = json.dumps({"jobs": described, "allow_missing": list(allow_missing)})
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has exited; `_await_warm_up` reports it
            self._process.stdin.write(config.encode() + b"\n")
            self._process.stdin.flush()

    def _await_warm_up(self, modules: Sequence[str]) -> None:
        """Wait for the greeting of every dispatcher."""
        deadline = time.monotonic() + WARM_UP_SECONDS
        for module, group in zip(modules, self.connections, strict=True):
            for connection in group:
                try:
                    if connection.poll(max(0.0, deadline - time.monotonic())):
                        connection.recv_bytes(16)
                        continue
                except (EOFError, OSError):
                    pass
                raise UserError(
                    f"the worker server did not start: check that `import {module}` works"
                )
