"""Several processes that run one program: they know the same, and they end together.

Each process takes the same decisions in the same order, since the compiled programs of all of them
meet in collectives. What only the main process can know goes over by `from_main`; what stops one
process stops all of them by `ending_together`, as otherwise the rest would wait for it for ever.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdjax.sharding.distributed import is_main_process

# Bytes that go over at once: a bounded buffer on the devices, and few shapes to compile for.
_CHUNK = 1 << 22
_ENDING = "sdjax/ending"
_POLL_SECONDS = 1.0
_WAIT_SECONDS = 10  # for the others to read why they end; one that is dead never does
_FINISH_SECONDS = 3600  # the main process may have a report to write


def from_main(compute: Callable[[], bytes]) -> bytes:
    """What `compute` returns on the main process, on every process; the others do not call it."""
    if jax.process_count() == 1:
        return compute()
    data = np.frombuffer(compute(), np.uint8) if is_main_process() else np.zeros(0, np.uint8)
    header = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
    size = int.from_bytes(multihost_utils.broadcast_one_to_all(header).tobytes(), "little")
    parts = []
    for start in range(0, size, _CHUNK):
        length = min(size - start, _CHUNK)
        part = np.zeros(1 << max(length - 1, 255).bit_length(), np.uint8)
        mine = data[start : start + length]
        part[: len(mine)] = mine
        parts.append(multihost_utils.broadcast_one_to_all(part)[:length].tobytes())
    return b"".join(parts)


@contextlib.contextmanager
def ending_together(describe: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
    """Whatever ends the block on one process ends all of them: one message, one exit status.

    The first exception counts. The main process prints its message, then all exit without further
    clean-up, since their main threads may be waiting in a collective. A process that is killed
    says nothing: the others end by JAX's own means, when a collective or a heartbeat fails. Alone,
    a process gets its exceptions as they are.

    Args:
        describe: the exit status and the message of an exception.
    """
    if jax.process_count() == 1:
        yield
        return
    group = _Group()
    finished = threading.Event()
    watcher = threading.Thread(target=group.watch, args=(finished,), daemon=True)
    watcher.start()
    try:
        yield
        group.wait("sdjax/finished", _FINISH_SECONDS)
    except BaseException as error:
        group.end(*describe(error))
    finished.set()
    watcher.join()


class _Group:
    """The processes, as they meet in JAX's coordination service, which needs no devices."""

    def __init__(self) -> None:
        from orbax.checkpoint import multihost

        # Any, since JAX has no public type for it.
        self._client: Any = multihost.get_jax_distributed_client()
        self._leaving = threading.Lock()

    def wait(self, name: str, seconds: int) -> None:
        self._client.wait_at_barrier(name, seconds * 1000)

    def watch(self, finished: threading.Event) -> None:
        """Ends this process when another one has said why all of them end."""
        while not finished.wait(_POLL_SECONDS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # nothing is said yet
                self._leave(self._client.key_value_try_get(_ENDING))

    def end(self, status: int, message: str) -> None:
        """Says why all processes end, unless another one has said so before, and ends."""
        ending = json.dumps([status, message])
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_ENDING, ending)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            ending = self._client.blocking_key_value_get(_ENDING, _WAIT_SECONDS * 1000)
        self._leave(ending)

    def _leave(self, ending: str) -> None:
        # Never released: the main thread and the watcher may both come here.
        self._leaving.acquire()
        status, message = json.loads(ending)
        if is_main_process():
            print(message, file=sys.stderr)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.wait(_ENDING, _WAIT_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_main_process():
            time.sleep(1)  # JAX ends the others by force once the process of the service is gone
        os._exit(status)
