"""Confined child of a fork server: applies the layers, then answers its requests.

Each message is a frame: its size (8 bytes, little-endian) and its bytes. The first frame of a child
is empty and says that it is confined.
"""

import gc
import os
from collections.abc import Callable
from dataclasses import dataclass

from sdjax.isolation.confine import confine
from sdjax.isolation.limits import WorkerLimits

HEADER_BYTES = 8


@dataclass(frozen=True, kw_only=True)
class ChildJob:
    """Job of a child.

    Attributes:
        work: function from request to reply.
        start: called once, before the filter of system calls is applied; see `confine`.
        limits: limits of the child and of each request.
        allow_missing: layers of confinement that it may run without.
    """

    work: Callable[[bytes], bytes]
    start: Callable[[], None]
    limits: WorkerLimits
    allow_missing: frozenset[str]


def run(pipe: int, parent_pid: int, job: ChildJob) -> None:
    """Confine this process and answer requests; exit after the last one, or if a layer is missing.

    Args:
        pipe: descriptor of the socket to the dispatcher.
        parent_pid: process id of the dispatcher.
        job: what to do.
    """
    if job.limits.requests > 1:
        gc.enable()  # garbage accumulates over many requests
    missing = confine(pipe, job.limits, job.start)
    if os.getppid() != parent_pid or not job.allow_missing.issuperset(missing):
        os._exit(1)
    _write(3, b"")
    for _ in range(job.limits.requests):
        size = int.from_bytes(_read(3, HEADER_BYTES), "little")
        _write(3, job.work(_read(3, size)))
    os._exit(0)


def frame(message: bytes) -> bytes:
    """Return a message with its header."""
    return len(message).to_bytes(HEADER_BYTES, "little") + message


def _read(pipe: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(pipe, min(size - len(data), 1 << 16))
        if not chunk:  # the dispatcher has closed its end
            os._exit(0)
        data += chunk
    return bytes(data)


def _write(pipe: int, message: bytes) -> None:
    data = frame(message)
    while data:
        data = data[os.write(pipe, data) :]
