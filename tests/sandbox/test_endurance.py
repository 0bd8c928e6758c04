"""Endurance test: a thousand candidates, a third of them crashing or hanging their worker."""

from collections import Counter
from pathlib import Path

import pytest
from catalogue import VALID
from test_leaks import NO_RULES

from sdjax.sandbox.config import Limits
from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.signature import MergeSignature

BAD = {
    "spins": "sum(range(10**12))\n",
    "waits": "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()\n",
    "ends": "import os\nos._exit(0)\n",
    "crashes": "import ctypes\nctypes.string_at(0)\n",
    "is killed for exec": "import os\nos.execv('/bin/true', ['true'])\n",
    "is killed for ptrace": "import ctypes\nctypes.CDLL(None).ptrace(0, 0, 0, 0)\n",
}


@pytest.mark.slow
def test_no_process_survives_a_thousand_candidates(signature, monkeypatch):
    monkeypatch.setattr("sdjax.isolation.client._BOOT", NO_RULES)
    limits = Limits(cpu_seconds=1, wall_seconds=1.5)
    short_limits = MergeSignature(slots=signature.slots, tensors=signature.tensors, limits=limits)
    bad = list(BAD.values())
    sources = [
        bad[(i // 3) % len(bad)] + VALID["linear"] if i % 3 == 0 else f"# {i}\n" + VALID["linear"]
        for i in range(1_000)
    ]
    with Sandbox(short_limits, workers=2) as sandbox:
        found = [verdict for _, verdict in sandbox.judge_all(sources)]
        server = sandbox._pool.pid
        assert len(_below(server)) <= 6  # the dispatchers, and the processes that compile
        assert _zombies(server) == 0
        pids = [server, *_below(server)]
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    verdicts = Counter(v.verdict for v in found)
    assert verdicts["timed out"] == sum(i % 18 in (0, 3) for i in range(0, 1_000, 3))
    assert verdicts["refused"] == 334 - verdicts["timed out"]
    assert verdicts["admitted"] + verdicts["duplicate"] == 666


def _below(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *_below(child))]


def _zombies(pid: int) -> int:
    return sum("State:\tZ" in Path(f"/proc/{p}/status").read_text() for p in _below(pid))
