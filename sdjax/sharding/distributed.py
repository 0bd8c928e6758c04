"""One program over several processes: a TPU pod, or machines that name their coordinator."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import jax

from sdjax.errors import UserError

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


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


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
