"""One program over several processes: start, broadcast from the main process, exit together.

A TPU pod, or machines that name their coordinator. Every process takes the same decisions in the
same order, since the compiled programs of all of them meet in collectives. Data that only the main
process has reaches the others through `broadcast_from_main`; `exit_together` ends all processes if
one of them fails, since the others would otherwise wait in a collective forever.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from sdjax.core.errors import UserError
from sdjax.core.logging import is_main_process as is_main_process

COORDINATOR = "SDJAX_COORDINATOR"
PROCESS_COUNT = "SDJAX_PROCESS_COUNT"
PROCESS_ID = "SDJAX_PROCESS_ID"

# The coordinator is then found by JAX itself: from a Cloud TPU's metadata, Slurm or Open MPI.
AUTO = "auto"
# What Kubernetes sets on the hosts of a TPU slice; elsewhere only the metadata server knows.
_TPU_HOSTS = "TPU_WORKER_HOSTNAMES"


def start_distributed(
    *,
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Joins this process to the others; call it before any other use of JAX.

    With a coordinator, by argument or by the variables SDJAX_COORDINATOR (host:port),
    SDJAX_PROCESS_COUNT and SDJAX_PROCESS_ID, the processes meet there; on the CPU they then talk
    through gloo. With the coordinator "auto" (as tpu/run.sh sets it), and on the hosts of a TPU
    slice under Kubernetes, JAX finds the other processes itself. Otherwise, or when this process
    has joined already, nothing happens.

    Returns:
        Whether this process is one of several.

    Raises:
        UserError: a part of the setting is missing or not a number, or the others do not come.
    """
    if jax.distributed.is_initialized():
        return jax.process_count() > 1
    environment = os.environ if environment is None else environment
    coordinator = coordinator or environment.get(COORDINATOR)
    if coordinator is None:
        if "," not in environment.get(_TPU_HOSTS, ""):
            return False
        coordinator = AUTO
    if coordinator == AUTO:
        return _join("this process could not find the others")
    count = _number(process_count, PROCESS_COUNT, environment)
    index = _number(process_id, PROCESS_ID, environment)
    if not 0 <= index < count:
        raise UserError(
            f"{PROCESS_ID}={index}: must be from 0 to {PROCESS_COUNT} - 1 = {count - 1}"
        )
    if ":" not in coordinator:
        raise UserError(f"{COORDINATOR}={coordinator!r}: give host:port")
    return _join(
        f"process {index} of {count} could not join at {coordinator}",
        coordinator_address=coordinator,
        num_processes=count,
        process_id=index,
    )


def _join(failure: str, **arguments: Any) -> bool:
    try:
        jax.distributed.initialize(**arguments)
    except (RuntimeError, ValueError, OSError) as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"{failure} ({line}); "
            "start the same command on every machine, before anything else uses JAX"
        ) from None
    return jax.process_count() > 1


def _number(value: int | None, name: str, environment: Mapping[str, str]) -> int:
    if value is not None:
        return value
    text = environment.get(name)
    try:
        return int(text or "")
    except ValueError:
        raise UserError(
            f"{name}={text!r}: a whole number is needed beside {COORDINATOR}; set it"
        ) from None


# Bytes that go over at once: a bounded buffer on the devices, and few shapes to compile for.
_CHUNK = 1 << 22
_ENDING = "sdjax/ending"
_POLL_SECONDS = 1.0
_WAIT_SECONDS = 10  # for the others to read why they end; one that is dead never does
_FINISH_SECONDS = 3600  # the main process may have a report to write


def broadcast_from_main(compute: Callable[[], bytes]) -> bytes:
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
def exit_together(describe: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
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
