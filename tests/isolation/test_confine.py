"""Confinement of a running worker, seen from outside, and machines that lack a layer."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdjax.core.errors import UserError
from sdjax.isolation.confine import ALWAYS, ENVIRONMENT, LAYERS, require_layers
from sdjax.isolation.server import DONE, NOT_STARTED

ROOT = Path(__file__).resolve().parents[2]
# System calls that the layers use, by number.
CALLS = {
    "x86_64": {"prctl": 157, "seccomp": 317, "capset": 126, "prlimit64": 302},
    "aarch64": {"prctl": 167, "seccomp": 277, "capset": 91, "prlimit64": 261},
}
for _calls in CALLS.values():
    _calls["landlock_create_ruleset"] = 444
# Layer -> the call that it needs, and the first argument of that call.
REQUIRED_CALLS = {
    "unprivileged-user": ("capset", None),
    "no-new-privs": ("prctl", 38),
    "parent-death-signal": ("prctl", 1),
    "not-dumpable": ("prctl", 4),
    "landlock": ("landlock_create_ruleset", None),
    "rlimits": ("prlimit64", None),
    "seccomp": ("seccomp", None),
}
# Forbids one system call to this process and its children, then lists the layers.
WITHOUT_CALL = """
import ctypes, sys
from sdjax.isolation.seccomp import ALLOW, EQUAL, ERRNO, LOAD, RETURN, install
number, first = {number}, {first}
ctypes.CDLL(None).prctl(38, 1, 0, 0, 0)
only = [] if first is None else [(LOAD, 0, 0, 16), (EQUAL, 0, 1, first)]
install([(LOAD, 0, 0, 0), (EQUAL, 0, 1 + len(only), number), *only,
         (RETURN, 0, 0, ERRNO | 38), (RETURN, 0, 0, ALLOW)])
from sdjax.core.errors import UserError
from sdjax.isolation.confine import require_layers
try:
    print(*require_layers({allow_missing}))
except UserError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def worker(start_server):
    """Yield the /proc entry of a worker that is processing a request."""
    server = start_server()
    server.connections[0][0].send_bytes(b"wait")
    deadline = time.monotonic() + 60
    while (entry := next(_confined(server.pid), None)) is None:
        assert time.monotonic() < deadline, "no worker is confined"
        time.sleep(0.01)
    yield entry
    server.stop()


def _confined(pid: int):
    """Yield the /proc entries of the descendants that have a seccomp filter."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        entry = Path(f"/proc/{child}")
        if "Seccomp:\t2" in (entry / "status").read_text():
            yield entry
        yield from _confined(int(child))


def test_worker_has_no_privileges(worker):
    status = dict(
        line.split(":\t", 1) for line in (worker / "status").read_text().split("\n") if line
    )
    assert status["NoNewPrivs"] == "1"
    assert status["Seccomp"] == "2"
    assert "0" not in status["Uid"].split()
    assert "0" not in status["Gid"].split()
    assert status["Groups"].strip() == "" or os.getuid() != 0
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert int(status[kind], 16) == 0
    assert status["Threads"] == "1"


def test_worker_has_its_limits(worker, limits):
    reported = (worker / "limits").read_text()
    expected = {
        "Max address space": limits.address_space,
        "Max cpu time": limits.cpu_seconds,
        "Max file size": 0,
        "Max core file size": 0,
        "Max open files": 0,
        "Max processes": 0,
    }
    for name, value in expected.items():
        (line,) = [line for line in reported.split("\n") if line.startswith(name)]
        assert line.removeprefix(name).split()[0] == str(value)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may inspect a worker")
def test_worker_has_one_descriptor_and_a_clean_environment(worker):
    assert os.listdir(worker / "fd") == ["3"]
    assert os.readlink(worker / "fd" / "3").startswith("socket:")
    environment = (worker / "environ").read_bytes().decode().strip("\0").split("\0")
    assert dict(line.split("=", 1) for line in environment) == ENVIRONMENT


def test_all_layers_are_in_force_on_this_machine():
    assert require_layers() == (*ALWAYS, *LAYERS)


def test_unknown_layer_raises_user_error():
    with pytest.raises(
        UserError, match=r"unknown layer 'sekkomp'; did you mean seccomp\? the layers are"
    ):
        require_layers(["sekkomp"])


def _layers_without(layer: str, allow_missing: list[str]) -> str:
    call, first_argument = REQUIRED_CALLS[layer]
    script = WITHOUT_CALL.format(
        number=CALLS[platform.machine()][call], first=first_argument, allow_missing=allow_missing
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, env=environment, capture_output=True, check=True, text=True
    ).stdout.strip()


def test_every_layer_is_tested_for_absence():
    assert REQUIRED_CALLS.keys() == LAYERS.keys()


@pytest.mark.parametrize("layer", REQUIRED_CALLS)
def test_missing_layer_is_refused_by_name_unless_allowed(layer):
    refusal = _layers_without(layer, [])
    assert refusal.startswith(f"refused: confinement layers unavailable: {layer} (Linux ")
    assert f"pass --allow-missing {layer} (in the config of a run: " in refusal
    assert "\n" not in refusal
    others = [name for name in LAYERS if name != layer]
    assert _layers_without(layer, others) == refusal  # allowing other layers does not help
    assert _layers_without(layer, [layer]).split() == [*ALWAYS, *others]


def test_worker_that_lacks_a_layer_exits_before_it_reads_the_request(start_server):
    """Check that the worker verifies its own layers, regardless of `require_layers`."""
    for allow_missing, reply in (((), NOT_STARTED), (("landlock",), DONE + b"request")):
        server = start_server(allow_missing=allow_missing, boot=_WITHOUT_LANDLOCK)
        server.connections[0][0].send_bytes(b"request")
        assert server.connections[0][0].recv_bytes() == reply


_WITHOUT_LANDLOCK = """
sys.path[:0] = {paths!r}
from sdjax.isolation import confine
def missing(limits): raise OSError
confine.LAYERS["landlock"] = missing
"""
