"""Multi-host coordination: start, broadcast from the main process, coordinated exit.

For TPU pods and for machines with a named coordinator. All processes make the same decisions in the
same order, since their executables meet in collectives. Data that only the main process has reaches
the others through `broadcast_from_main`. `exit_together` ends all processes if one of them fails,
since the others would otherwise wait in a collective forever.
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
from sdjax.core.visible import escape

COORDINATOR = "SDJAX_COORDINATOR"
PROCESS_COUNT = "SDJAX_PROCESS_COUNT"
PROCESS_ID = "SDJAX_PROCESS_ID"

# JAX finds the coordinator itself, from Cloud TPU metadata, Slurm or Open MPI.
AUTO = "auto"
# Set by Kubernetes on the hosts of a TPU slice.
_TPU_HOSTS = "TPU_WORKER_HOSTNAMES"


def start_distributed(
    *,
    coordinator: str | None = None,
    process_count: int | None = None,
    process_id: int | None = None,
    environment: Mapping[str, str] | None = None,
) -> bool:
    """Join this process to the others; must precede any other use of JAX.

    If no coordinator is given, the environment variables SDJAX_COORDINATOR, SDJAX_PROCESS_COUNT
    and SDJAX_PROCESS_ID apply. With the coordinator "auto" (set by tpu/run.sh), and on the hosts of
    a TPU slice under Kubernetes, JAX finds the other processes itself. Without a coordinator, or if
    this process has joined already, nothing happens. On the CPU, processes communicate with gloo.

    Args:
        coordinator: host:port of the coordinator, or "auto".
        process_count: number of processes.
        process_id: index of this process, from 0.
        environment: environment variables; those of this process by default.

    Returns:
        Whether this process is one of several.

    Raises:
        UserError: a setting is missing or invalid, or the other processes do not join.
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
            f"{name}={text!r}: must be set to a whole number if {COORDINATOR} is set"
        ) from None


# Bytes per broadcast: bounds the buffer on the devices and the number of shapes to compile.
_CHUNK = 1 << 22
_EXIT_KEY = "sdjax/exit"
_POLL_SECONDS = 1.0
_EXIT_SECONDS = 10  # for all processes to read the exit message; a dead one never does
_FINISH_SECONDS = 3600  # the main process may still write a report


def broadcast_from_main(compute: Callable[[], bytes]) -> bytes:
    """Return the result of `compute` on the main process to all processes.

    The other processes do not call `compute`.
    """
    if jax.process_count() == 1:
        return compute()
    data = np.frombuffer(compute(), np.uint8) if is_main_process() else np.zeros(0, np.uint8)
    header = np.frombuffer(len(data).to_bytes(8, "little"), np.uint8)
    size = int.from_bytes(multihost_utils.broadcast_one_to_all(header).tobytes(), "little")
    parts = []
    for start in range(0, size, _CHUNK):
        length = min(size - start, _CHUNK)
        part = np.zeros(1 << max(length - 1, 255).bit_length(), np.uint8)
        local = data[start : start + length]
        part[: len(local)] = local
        parts.append(multihost_utils.broadcast_one_to_all(part)[:length].tobytes())
    return b"".join(parts)


@contextlib.contextmanager
def exit_together(describe: Callable[[BaseException], tuple[int, str]]) -> Iterator[None]:
    """End all processes if the block raises on one of them.

    The first exception determines the exit status and the message, which the main process prints.
    All processes then exit without cleanup, since their main threads may be waiting in a
    collective. If a process is killed, the others end when JAX notices a failed collective or
    heartbeat. With a single process, exceptions propagate as usual.

    Args:
        describe: returns the exit status and the message of an exception.
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
        group.exit(*describe(error))
    finished.set()
    watcher.join()


class _Group:
    """The processes as clients of JAX's coordination service, which needs no devices."""

    def __init__(self) -> None:
        from orbax.checkpoint import multihost

        # JAX has no public type for it.
        self._client: Any = multihost.get_jax_distributed_client()
        self._exiting = threading.Lock()

    def wait(self, name: str, seconds: int) -> None:
        self._client.wait_at_barrier(name, seconds * 1000)

    def watch(self, finished: threading.Event) -> None:
        """Exit once another process has published an exit message."""
        while not finished.wait(_POLL_SECONDS):
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # not published yet
                self._exit(self._client.key_value_try_get(_EXIT_KEY))

    def exit(self, status: int, message: str) -> None:
        """Publish the exit message, unless another process has published one, and exit."""
        ending = json.dumps([status, message])
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self._client.key_value_set(_EXIT_KEY, ending)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            ending = self._client.blocking_key_value_get(_EXIT_KEY, _EXIT_SECONDS * 1000)
        self._exit(ending)

    def _exit(self, ending: str) -> None:
        # Never released: the main thread and the watcher may both get here.
        self._exiting.acquire()
        status, message = json.loads(ending)
        if is_main_process():
            print(escape(message), file=sys.stderr)
        with contextlib.suppress(jax.errors.JaxRuntimeError):
            self.wait(_EXIT_KEY, _EXIT_SECONDS)
        sys.stdout.flush()
        sys.stderr.flush()
        if is_main_process():
            time.sleep(1)  # JAX kills the others when the process of the service ends
        os._exit(status)
