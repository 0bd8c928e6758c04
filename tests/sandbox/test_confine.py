"""A worker at work, looked at from outside; and machines that lack a layer."""

import os
import platform
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from catalogue import VALID

from sdjax.core.errors import UserError
from sdjax.isolation.confine import ALWAYS, ENVIRONMENT, LAYERS, require_layers
from sdjax.sandbox.sandbox import Sandbox

ROOT = Path(__file__).resolve().parents[2]
# The numbers of the calls that the layers are made of, where a test takes them away.
CALLS = {
    "x86_64": {"prctl": 157, "capset": 126, "prlimit64": 302, "landlock_create_ruleset": 444},
    "aarch64": {"prctl": 167, "capset": 91, "prlimit64": 261, "landlock_create_ruleset": 444},
}
TAKEN_AWAY = {
    "unprivileged-user": ("capset", None),
    "no-new-privs": ("prctl", 38),
    "parent-death-signal": ("prctl", 1),
    "not-dumpable": ("prctl", 4),
    "landlock": ("landlock_create_ruleset", None),
    "rlimits": ("prlimit64", None),
    "seccomp": ("prctl", 22),
}
# Takes a call away from this process and all that come of it, then asks for the layers.
POORER = """
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
    print(*require_layers({allowed}))
except UserError as error:
    print("refused:", error)
"""


@pytest.fixture(scope="module")
def worker(signature):
    """The /proc entry of a worker that is judging a program."""
    with Sandbox(signature, workers=1) as sandbox:
        judging = threading.Thread(
            target=lambda: sandbox.judge("sum(range(10**12))\n" + VALID["linear"])
        )
        judging.start()
        entry = None
        while entry is None and judging.is_alive():
            entry = next(_confined(sandbox._server.pid), None)
            time.sleep(0.01)
        assert entry is not None
        yield entry
        judging.join()


def _confined(pid: int):
    """Entries below a process that are under a seccomp filter."""
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        entry = Path(f"/proc/{child}")
        if "Seccomp:\t2" in (entry / "status").read_text():
            yield entry
        yield from _confined(int(child))


def test_a_worker_has_given_everything_up(worker):
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


def test_a_worker_has_its_limits(worker, signature):
    limits = (worker / "limits").read_text()
    wanted = {
        "Max address space": signature.limits.address_space,
        "Max cpu time": signature.limits.cpu_seconds,
        "Max file size": 0,
        "Max core file size": 0,
        "Max open files": 0,
        "Max processes": 0,
    }
    for name, value in wanted.items():
        (line,) = [line for line in limits.split("\n") if line.startswith(name)]
        assert line.removeprefix(name).split()[0] == str(value)


@pytest.mark.skipif(os.getuid() != 0, reason="only root may look into a worker")
def test_a_worker_has_one_descriptor_and_a_clean_environment(worker):
    assert os.listdir(worker / "fd") == ["3"]
    assert os.readlink(worker / "fd" / "3").startswith("socket:")
    environment = (worker / "environ").read_bytes().decode().strip("\0").split("\0")
    assert dict(line.split("=", 1) for line in environment) == ENVIRONMENT


def test_this_machine_has_all_layers():
    assert require_layers() == (*ALWAYS, *LAYERS)


def test_the_sandbox_tells_its_layers(sandbox):
    assert sandbox.layers == (*ALWAYS, *LAYERS)


def test_an_unknown_layer_is_the_users_mistake():
    with pytest.raises(UserError, match=r"no layer 'sekkomp'; the layers are .*seccomp"):
        require_layers(["sekkomp"])


def _poorer(layer: str, allowed: list[str]) -> str:
    call, first = TAKEN_AWAY[layer]
    number = CALLS[platform.machine()][call]
    script = POORER.format(number=number, first=first, allowed=allowed)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", script]
    return subprocess.run(
        command, env=environment, capture_output=True, check=True, text=True
    ).stdout.strip()


def test_every_layer_can_be_missing():
    assert TAKEN_AWAY.keys() == LAYERS.keys()


@pytest.mark.parametrize("layer", TAKEN_AWAY)
def test_a_missing_layer_is_named_and_refused_until_it_is_allowed(layer):
    refusal = _poorer(layer, [])
    assert refusal.startswith(f"refused: the sandbox lacks {layer} on this machine (Linux ")
    assert f"--allow-missing {layer}, or sandbox.allow_missing" in refusal
    assert "\n" not in refusal
    others = [name for name in LAYERS if name != layer]
    assert _poorer(layer, others) == refusal  # another layer's name does not help
    assert _poorer(layer, [layer]).split() == [*ALWAYS, *others]


def test_a_worker_that_lacks_a_layer_ends_before_it_sees_a_program(signature, monkeypatch):
    """Even where the survey was wrong: the worker itself knows what it has."""
    poorer = _BOOT_WITHOUT
    monkeypatch.setattr("sdjax.isolation.client._BOOT", poorer)
    with Sandbox(signature, workers=1) as sandbox:
        verdict = sandbox.judge(VALID["linear"])
        assert (verdict.verdict, verdict.rule) == ("refused", "worker")
    with Sandbox(signature, workers=1, allow_missing=["landlock"]) as sandbox:
        assert sandbox.judge(VALID["linear"]).admitted


_BOOT_WITHOUT = (
    "import sys; sys.path[:0] = {paths!r}\n"
    "from sdjax.sandbox import confine\n"
    "def missing(limits): raise OSError\n"
    "confine.LAYERS['landlock'] = missing\n"
    "from sdjax.isolation.server import main; main(*{args})"
)
