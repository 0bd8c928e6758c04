"""Workers that may compile and that serve several requests."""

import dataclasses
import os
import signal
import time
from pathlib import Path

import pytest

from sdjax.isolation import client
from sdjax.isolation.client import Job
from sdjax.isolation.pool import Request, WorkerPool
from sdjax.isolation.server import DIED, DONE, OUT_OF_CPU, OUT_OF_TIME

REQUESTS = 5


@pytest.fixture(scope="module")
def compiling(limits):
    return dataclasses.replace(limits, compiles=True, requests=REQUESTS, cpu_seconds=1)


@pytest.fixture(scope="module")
def ask(start_server, compiling):
    ((connection,),) = start_server(compiling).connections

    def send(request: bytes) -> bytes:
        connection.send_bytes(request)
        return connection.recv_bytes(1 << 16)

    return send


@pytest.mark.parametrize(
    ("request_", "reply"),
    [
        (b"thread", b"499500"),
        (b"executable memory", b"allowed"),
        (b"start", b"/dev/urandom /proc/cpuinfo"),  # only in `start`, and nothing else
        (b"random source", b"FileNotFoundError"),
        (b"file", b"FileNotFoundError"),
        (b"socket", b"PermissionError"),
        (b"process", b"PermissionError"),
    ],
)
def test_compiling_worker_has_threads_and_executable_memory_only(ask, request_, reply):
    assert ask(request_) == DONE + reply
    assert ask(b"exec") == DIED  # killed by the filter


def test_ordinary_worker_has_neither(start_server, limits):
    ((connection,),) = start_server(limits).connections
    for request, reply in (
        (b"executable memory", DONE + b"PermissionError"),
        (b"start", DONE),
        (b"thread", DIED),
    ):
        connection.send_bytes(request)
        assert connection.recv_bytes(1 << 16) == reply


def test_process_serves_its_requests_and_is_replaced(ask):
    ask(b"exit")  # begin with a new process
    replies = [ask(b"count") for _ in range(REQUESTS + 1)]
    assert replies == [DONE + str(n).encode() for n in (*range(1, REQUESTS + 1), 1)]


def test_death_after_earlier_requests_is_tried_in_a_new_process(ask):
    ask(b"exit")
    assert ask(b"count") == DONE + b"1"
    assert ask(b"exit") == DIED
    assert ask(b"count") == DONE + b"1"


def test_limits_hold_for_each_request(ask):
    for _ in range(2):
        assert ask(b"spin") == OUT_OF_CPU
    assert ask(b"any bytes") == DONE + b"any bytes"


PATIENT, HASTY = 0, 1  # jobs of the pool
WALL_SECONDS = 1.0  # of the second one


@pytest.fixture
def pool(compiling, monkeypatch):
    """Yield a pool in which only requests to `HASTY` can run out of time."""
    path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    monkeypatch.setattr(client, "_BOOT", path + client._BOOT)
    hasty = dataclasses.replace(compiling, wall_seconds=WALL_SECONDS)
    pool = WorkerPool([Job(module="jobs", limits=one) for one in (compiling, hasty)])
    pool.start()
    yield pool
    pool.stop()


def test_pool_repeats_a_crash_and_a_timeout_once_and_alone(pool):
    started = time.monotonic()
    pool.submit(Request(job=HASTY, key="hangs", data=b"wait"))
    pool.submit(Request(job=PATIENT, key="crashes", data=b"exit"))
    replies = {}
    while pool.busy:
        replies |= {reply.key: reply for reply in pool.collect()}
    assert replies["hangs"].status == OUT_OF_TIME
    assert replies["crashes"].status == DIED
    assert time.monotonic() - started > 2 * WALL_SECONDS - 0.1
    pool.submit(Request(job=PATIENT, key="works", data=b"x"))
    (reply,) = pool.collect()
    assert (reply.key, reply.status, reply.data) == ("works", DONE, b"x")


def test_pool_survives_the_loss_of_its_server(pool):
    pool.submit(Request(job=PATIENT, key="lost", data=b"x"))
    os.kill(pool.pid, signal.SIGKILL)
    (reply,) = pool.collect()
    assert (reply.key, reply.data) == ("lost", b"x")
