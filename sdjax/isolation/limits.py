"""Resource limits of one confined worker process."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """Resource limits of one worker, which processes one request.

    Attributes:
        cpu_seconds: processor time, enforced by the kernel (SIGXCPU).
        wall_seconds: wall-clock time, enforced by the dispatcher (SIGKILL).
        address_space: bytes of virtual memory.
        message_bytes: maximum size of the reply in bytes.
    """

    cpu_seconds: int = 4
    wall_seconds: float = 12.0
    address_space: int = 2 << 30
    message_bytes: int = 4 << 20
