"""Resource limits of one confined worker process."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class WorkerLimits:
    """Resource limits of one worker, which processes one request.

    Attributes:
        cpu_seconds: Processor time, enforced by the kernel (SIGXCPU).
        wall_seconds: Wall-clock time, enforced by the dispatcher (SIGKILL).
        address_space: Bytes of virtual memory.
        message_bytes: Maximum size of the reply in bytes.
    """

    cpu_seconds: int = 4
    wall_seconds: float = 12.0
    address_space: int = 2 << 30
    message_bytes: int = 4 << 20
