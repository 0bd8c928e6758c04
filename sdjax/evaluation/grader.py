"""Comparison of answers to math problems in confined workers that can be killed."""

from __future__ import annotations

import atexit
import json
import threading
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import Connection
from queue import SimpleQueue

from sdjax.evaluation.task import NotGradedError
from sdjax.isolation.client import ForkServer, Job
from sdjax.isolation.confine import require_layers
from sdjax.isolation.limits import WorkerLimits
from sdjax.isolation.server import DONE, OUT_OF_CPU, OUT_OF_TIME

# Processor time varies little between machines; the wall clock stops a worker that waits.
LIMITS = WorkerLimits(
    cpu_seconds=5, wall_seconds=30.0, address_space=2 << 30, message_bytes=1 << 16
)


class Grader:
    """Thread-safe pool that compares answers to math problems, each pair in a new worker process.

    Attributes:
        limits: limits of one comparison.
        layers: layers of confinement in force.
    """

    def __init__(
        self, workers: int = 2, limits: WorkerLimits = LIMITS, allow_missing: Sequence[str] = ()
    ):
        """Start the workers.

        Args:
            workers: number of comparisons that can run at the same time.
            limits: limits of one comparison.
            allow_missing: layers of confinement that this machine may lack.

        Raises:
            UserError: this machine lacks a layer that is not in `allow_missing`.
        """
        self.layers = require_layers(allow_missing)
        self.limits = limits
        self._workers, self._allow_missing = workers, tuple(allow_missing)
        self._restart_lock = threading.Lock()
        self._start()

    def same(self, gold: str, answer: str) -> bool:
        """Return whether math-verify considers two answers equal.

        Args:
            gold: correct answer, LaTeX without dollar signs.
            answer: answer to grade, LaTeX without dollar signs.

        Raises:
            NotGradedError: the worker ran out of time or memory, or crashed.
        """
        request = json.dumps([gold, answer]).encode()
        reply = self._send(request)
        if reply[:1] == OUT_OF_TIME:  # the machine may have been busy
            reply = self._send(request)
        if reply[:1] in (OUT_OF_TIME, OUT_OF_CPU):
            raise NotGradedError("grading timed out")
        try:
            message = json.loads(reply[1:] if reply[:1] == DONE else b"")
            equal, failed_imports = message["equal"], message["failed_imports"]
        except (ValueError, RecursionError, TypeError, KeyError):
            raise NotGradedError("the grading worker exited without a reply") from None
        if equal is not True and failed_imports:
            module = str(failed_imports[0])[:60]
            raise NotGradedError(f"the grading worker could not import {module}")
        return equal is True

    def close(self) -> None:
        """Stop the workers."""
        self._server.stop()

    def _start(self) -> None:
        job = Job(
            module="sdjax.evaluation.answer_worker", limits=self.limits, workers=self._workers
        )
        self._server = ForkServer([job], self._allow_missing)
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for connection in self._server.connections[0]:
            self._idle.put(connection)

    def _send(self, request: bytes) -> bytes:
        """Return a worker's status and reply, or b"" if its server is killed repeatedly."""
        for _ in range(2):
            server, idle = self._server, self._idle
            connection = idle.get()
            try:
                connection.send_bytes(request)
                reply = connection.recv_bytes(self.limits.message_bytes + 1)
            except (EOFError, OSError):  # the dispatcher was killed
                with self._restart_lock:
                    if self._server is server:
                        server.stop()
                        self._start()
                reply = b""
            idle.put(connection)  # even if dead, so that a waiting thread notices
            if reply:
                return reply
        return b""


@cache
def shared_grader(allow_missing: tuple[str, ...] = ()) -> Grader:
    """Return the grader of this process; it starts on first use and stops at exit.

    Its server inherits nothing from this process and exits if this process is killed.
    """
    grader = Grader(allow_missing=allow_missing)
    atexit.register(grader.close)
    return grader
