"""Replies of fork servers, and their reports of how a worker exited."""

import contextlib
import dataclasses
from pathlib import Path

import pytest

from sdjax.core.errors import UserError
from sdjax.isolation.client import ForkServer, Job
from sdjax.isolation.server import DIED, DONE, OUT_OF_CPU, OUT_OF_TIME, TOO_LONG


@pytest.fixture(scope="module")
def ask(start_server, limits):
    cpu_limits = dataclasses.replace(limits, cpu_seconds=1)
    wall_limits = dataclasses.replace(limits, wall_seconds=1.0)
    ((default,),) = start_server(cpu_limits).connections
    ((wall_limited,),) = start_server(wall_limits).connections

    def send(request: bytes) -> bytes:
        connection = wall_limited if request == b"wait" else default
        connection.send_bytes(request)
        return connection.recv_bytes(limits.message_bytes + 1)

    return send


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (b"any bytes \0\xff", DONE + b"any bytes \0\xff"),
        (b"x" * (1 << 16), DONE + b"x" * (1 << 16)),
        (b"", DONE),
        (b"spin", OUT_OF_CPU),
        (b"wait", OUT_OF_TIME),
        (b"exit", DIED),
        (b"open", DIED),
        (b"allocate", DIED),
        (b"flood", TOO_LONG),
    ],
    ids=["echo", "largest", "empty", "spin", "wait", "exit", "open", "allocate", "flood"],
)
def test_status_reports_how_a_worker_exited(ask, request_, reply):
    assert ask(request_) == reply
    assert ask(b"next") == DONE + b"next"


_SLOW_START = """
sys.path[:0] = {paths!r}
import time
from sdjax.isolation import confine
confine.LAYERS["landlock"] = lambda limits: time.sleep(600)
"""


def test_start_that_runs_out_of_time_is_reported_as_such(start_server, limits):
    """The pool repeats it; a missing layer would refuse the request for good."""
    hasty = dataclasses.replace(limits, wall_seconds=0.1)
    ((connection,),) = start_server(hasty, boot=_SLOW_START).connections
    connection.send_bytes(b"request")
    assert connection.recv_bytes() == OUT_OF_TIME


def test_job_that_cannot_be_imported_raises_user_error(limits):
    with pytest.raises(UserError, match="did not start: check that `import no_such_job` works"):
        ForkServer([Job(module="no_such_job", limits=limits)])


def test_stop_leaves_no_process(start_server):
    server = start_server(workers=2)
    server.connections[0][0].send_bytes(b"spin")
    pids = [server.pid, *_descendants(server.pid)]
    assert len(pids) >= 3
    server.stop()
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)


def _descendants(pid: int) -> list[int]:
    children: list[int] = []
    with contextlib.suppress(OSError):
        children = [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [p for child in children for p in (child, *_descendants(child))]
