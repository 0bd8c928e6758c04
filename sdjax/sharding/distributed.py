"""One program over several processes: a TPU pod, or machines that name their coordinator."""

from __future__ import annotations

import os
from collections.abc import Mapping

import jax

from sdjax.errors import UserError

COORDINATOR = "SDJAX_COORDINATOR"
PROCESS_COUNT = "SDJAX_PROCESS_COUNT"
PROCESS_ID = "SDJAX_PROCESS_ID"

# Set by the TPU runtime on a slice of several hosts, as `jax.distributed` looks for them.
_TPU_HOSTS = ("TPU_WORKER_HOSTNAMES", "MEGASCALE_COORDINATOR_ADDRESS")


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
    through gloo. On a TPU slice of several hosts nothing need be given. Otherwise, or when the
    process has joined already, nothing happens.

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
        hosts = [name for name in _TPU_HOSTS if environment.get(name)]
        several = "MEGASCALE_COORDINATOR_ADDRESS" in hosts or any(
            "," in environment[name] for name in hosts
        )
        if not several:
            return False
        jax.distributed.initialize()
        return jax.process_count() > 1
    count = _number(process_count, PROCESS_COUNT, environment)
    index = _number(process_id, PROCESS_ID, environment)
    if not 0 <= index < count:
        raise UserError(f"{PROCESS_ID}={index}: must be from 0 to {PROCESS_COUNT} - 1 = {count - 1}")
    if ":" not in coordinator:
        raise UserError(f"{COORDINATOR}={coordinator!r}: give host:port")
    if jax.config.jax_platforms == "cpu":
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
    try:
        jax.distributed.initialize(coordinator, num_processes=count, process_id=index)
    except RuntimeError as error:
        line = " ".join(str(error).split())[:300]
        raise UserError(
            f"process {index} of {count} could not join at {coordinator} ({line}); "
            "start the same command on every machine, before anything else uses JAX"
        ) from None
    return jax.process_count() > 1


def is_main_process() -> bool:
    """Whether this process is the one that prints and writes."""
    return jax.process_index() == 0


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
