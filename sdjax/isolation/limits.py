"""Resource limits of one confined worker process."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """Resource limits of a worker and of each request that it processes. Each job sets its own.

    Attributes:
        cpu_seconds: processor time per request.
        wall_seconds: wall-clock time per request, enforced by the dispatcher (SIGKILL).
        address_space: bytes of virtual memory of the process.
        message_bytes: maximum size of a reply in bytes.
        requests: requests that one process serves before it is replaced.
        compiles: whether the process may make memory executable and start threads, as a compiler
            must.
    """

    cpu_seconds: int
    wall_seconds: float
    address_space: int
    message_bytes: int
    requests: int = 1
    compiles: bool = False
