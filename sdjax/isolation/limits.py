"""Resource limits of one confined worker process."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """Resource limits of one worker, which processes one request. Each job sets its own.

    Attributes:
        cpu_seconds: processor time, enforced by the kernel (SIGXCPU).
        wall_seconds: wall-clock time, enforced by the dispatcher (SIGKILL).
        address_space: bytes of virtual memory.
        message_bytes: maximum size of the reply in bytes.
    """

    cpu_seconds: int
    wall_seconds: float
    address_space: int
    message_bytes: int
