"""Job for fork servers: each request names one behavior of a worker."""

import os
import threading
from collections.abc import Callable


def _spin() -> bytes:
    while True:
        pass


def _wait() -> bytes:  # the seccomp filter forbids sleeping, but not waiting for a lock
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
    return b""


def _exit() -> bytes:
    os._exit(7)


BEHAVIORS: dict[bytes, Callable[[], bytes]] = {
    b"spin": _spin,
    b"wait": _wait,
    b"exit": _exit,
    b"flood": lambda: b"x" * (1 << 20),
    b"open": lambda: open("/etc/passwd", "rb").read(),  # noqa: SIM115
    b"allocate": lambda: bytes(1 << 31)[:1],
}


def prepare(argument: str) -> Callable[[bytes], bytes]:
    """Return the function from request to reply; unknown requests are echoed."""
    return lambda request: BEHAVIORS.get(request, lambda: request)()
