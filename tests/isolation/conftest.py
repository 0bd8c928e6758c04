"""Fixtures for fork servers whose job is `jobs.py` in this folder."""

from pathlib import Path

import pytest

from sdjax.isolation import client
from sdjax.isolation.client import ForkServer, Job
from sdjax.isolation.limits import WorkerLimits

# A worker that uses up its processor time must do so before the wall clock, on a busy machine, too.
LIMITS = WorkerLimits(
    cpu_seconds=2, wall_seconds=600.0, address_space=1 << 30, message_bytes=1 << 16
)


@pytest.fixture(scope="session")
def limits() -> WorkerLimits:
    return LIMITS


@pytest.fixture(scope="session")
def start_server():
    """Return a function that starts a server; all servers are stopped at the end."""
    servers = []

    def start(limits: WorkerLimits = LIMITS, workers: int = 1, allow_missing=(), boot: str = ""):
        with pytest.MonkeyPatch.context() as patch:
            path = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
            patch.setattr(client, "_BOOT", path + boot + client._BOOT)
            job = Job(module="jobs", limits=limits, workers=workers)
            servers.append(ForkServer([job], allow_missing))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()
