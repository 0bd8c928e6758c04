"""Whether two answers of mathematics are the same, asked of confined workers that can be killed."""

from __future__ import annotations

import atexit
import json
import threading
from collections.abc import Sequence
from functools import cache
from multiprocessing.connection import Connection
from queue import SimpleQueue

from sdjax.evaluation.task import NotGradedError
from sdjax.isolation.client import ForkServer
from sdjax.isolation.confine import require_layers
from sdjax.isolation.limits import WorkerLimits
from sdjax.isolation.server import DONE, OUT_OF_CPU, OUT_OF_TIME

# Processor time decides, as it is much the same on every machine; the wall clock is for what waits.
LIMITS = WorkerLimits(
    cpu_seconds=5, wall_seconds=30.0, address_space=2 << 30, message_bytes=1 << 16
)


class Grader:
    """Compares answers, each pair in a worker of its own; several threads may ask at once.

    Attributes:
        limits: of one comparison.
        layers: of confinement that are in force.
    """

    def __init__(
        self, workers: int = 2, limits: WorkerLimits = LIMITS, allow_missing: Sequence[str] = ()
    ):
        """Starts the workers. UserError where this machine lacks a layer not in `allow_missing`."""
        self.layers = require_layers(allow_missing)
        self.limits = limits
        self._workers, self._allow_missing = workers, tuple(allow_missing)
        self._replacing = threading.Lock()
        self._start()

    def same(self, gold: str, answer: str) -> bool:
        """Whether math-verify takes `answer` for `gold`, both LaTeX without dollar signs.

        Raises:
            NotGradedError: the worker ran out of time or memory, or ended otherwise.
        """
        text = json.dumps([gold, answer]).encode()
        reply = self._ask(text)
        if reply[:1] == OUT_OF_TIME:  # perhaps the machine was busy: once more
            reply = self._ask(text)
        if reply[:1] in (OUT_OF_TIME, OUT_OF_CPU):
            raise NotGradedError("grading timed out")
        try:
            message = json.loads(reply[1:] if reply[:1] == DONE else b"")
            equal, missed = message["equal"], message["missed"]
        except (ValueError, RecursionError, TypeError, KeyError):
            raise NotGradedError("the grading worker ended without an answer") from None
        if equal is not True and missed:
            raise NotGradedError(f"the grading worker lacks the module {str(missed[0])[:60]}")
        return equal is True

    def close(self) -> None:
        """Ends the workers."""
        self._server.stop()

    def _start(self) -> None:
        self._server = ForkServer(
            "sdjax.evaluation.answer_worker", "", self.limits, self._workers, self._allow_missing
        )
        self._idle: SimpleQueue[Connection] = SimpleQueue()
        for connection in self._server.connections:
            self._idle.put(connection)

    def _ask(self, text: bytes) -> bytes:
        """A worker's status and message; nothing where the machine kills them again and again."""
        for _ in range(2):
            server, idle = self._server, self._idle
            connection = idle.get()
            try:
                connection.send_bytes(text)
                reply = connection.recv_bytes(self.limits.message_bytes + 1)
            except (EOFError, OSError):  # its dispatcher is gone, killed by the machine
                with self._replacing:
                    if self._server is server:
                        server.stop()
                        self._start()
                reply = b""
            idle.put(connection)  # a dead one too: whoever waits for it finds out
            if reply:
                return reply
        return b""


@cache
def shared_grader(allow_missing: tuple[str, ...] = ()) -> Grader:
    """The grader of this process; it starts when it is first asked for and ends with the process.

    Its warm server holds nothing of the parent's and ends by itself if the parent is killed.
    """
    grader = Grader(allow_missing=allow_missing)
    atexit.register(grader.close)
    return grader
