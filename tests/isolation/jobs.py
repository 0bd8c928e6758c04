"""Job for fork servers: each request names one behavior of a worker."""

import contextlib
import itertools
import mmap
import os
import socket
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


def _thread() -> bytes:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(sum(range(1000))))
    thread.start()
    thread.join()
    return str(results[0]).encode()


def _refused(call: Callable[[], object]) -> Callable[[], bytes]:
    """Return a behavior that replies with the error of a call."""

    def behave() -> bytes:
        try:
            call()
        except OSError as error:
            return type(error).__name__.encode()
        return b"allowed"

    return behave


_executable = mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC
_requests = itertools.count(1)
_opened: list[str] = []  # by `start`

BEHAVIORS: dict[bytes, Callable[[], bytes]] = {
    b"spin": _spin,
    b"wait": _wait,
    b"exit": _exit,
    b"flood": lambda: b"x" * (1 << 20),
    b"open": lambda: open("/etc/passwd", "rb").read(),  # noqa: SIM115
    b"allocate": lambda: bytes(1 << 31)[:1],
    b"count": lambda: str(next(_requests)).encode(),
    b"start": lambda: " ".join(_opened).encode(),
    b"thread": _thread,
    b"executable memory": _refused(lambda: mmap.mmap(-1, 4096, prot=_executable)),
    b"file": _refused(lambda: os.open("/etc/passwd", os.O_RDONLY)),
    b"random source": _refused(lambda: os.open("/dev/urandom", os.O_RDONLY)),
    b"socket": _refused(socket.socket),
    b"process": _refused(os.fork),
    b"exec": _refused(lambda: os.execv("/bin/true", ["true"])),
}


def start() -> None:
    """Open what a compiler reads, and what it must not read."""
    for path in ("/dev/urandom", "/proc/cpuinfo", "/etc/passwd"):
        with contextlib.suppress(OSError):
            os.close(os.open(path, os.O_RDONLY))
            _opened.append(path)


def prepare(argument: str) -> Callable[[bytes], bytes]:
    """Return the function from request to reply; unknown requests are echoed."""
    return lambda request: BEHAVIORS.get(request, lambda: request)()
