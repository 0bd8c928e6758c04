"""The parent's handle on a fork server (server.py): starts it, and keeps a line to each worker."""

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
from sdjax.sandbox.signature import Limits

WARM_UP_SECONDS = 120.0
_BOOT = (
    "import sys; sys.path[:0] = {paths!r}; from sdjax.isolation.server import main; main(*{args})"
)


class ForkServer:
    """A warm process whose confined children work on one text each.

    Each of `connections` takes one text and answers it with a status byte and, where that is
    server.DONE, the message: untrusted bytes, at most `limits.wire_bytes`. Whoever starts a
    server has asked `require_layers` first.

    Attributes:
        pid: of the process.
        connections: one a worker, ready for a text.
    """

    def __init__(
        self,
        job: str,
        argument: str,
        limits: Limits,
        workers: int,
        allow_missing: Sequence[str] = (),
    ):
        """Start it and wait until it is warm.

        job: a module with `prepare(argument)`. Raises UserError where it does not start.
        """
        pairs = [socket.socketpair() for _ in range(workers)]
        theirs = [pair[1].fileno() for pair in pairs]
        arguments = (theirs, job, argument, dumps(asdict(limits)), list(allow_missing))
        boot = _BOOT.format(paths=package_path(), args=arguments)
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", boot],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=ENVIRONMENT,
            cwd="/",
            pass_fds=theirs,
            start_new_session=True,  # Ctrl-C in the terminal is the parent's business
        )
        for _, end in pairs:
            end.close()
        self.connections = tuple(Connection(ours.detach()) for ours, _ in pairs)
        self._await_warm_up(job)

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> None:
        """End it and all its children."""
        for connection in self.connections:
            connection.close()
        assert self._process.stdin is not None
        self._process.stdin.close()  # its read returns, it ends, and all its children with it
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _await_warm_up(self, job: str) -> None:
        """A dispatcher greets when it is ready."""
        deadline = time.monotonic() + WARM_UP_SECONDS
        for connection in self.connections:
            try:
                if connection.poll(max(0.0, deadline - time.monotonic())):
                    connection.recv_bytes(16)
                    continue
            except (EOFError, OSError):
                pass
            self.stop()
            raise UserError(f"the sandbox's server did not start: check that `import {job}` works")
