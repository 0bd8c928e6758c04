"""Attacks against canaries, with the text rules and with confinement alone."""

import json
import os
import secrets
import socket
import stat
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from catalogue import VALID
from hostile import DETECTABLE, HOSTILE
from refused import REFUSED

from sdjax.sandbox.sandbox import Sandbox
from sdjax.sandbox.verdict import VERDICTS

# Boot code of a server without text rules and with all builtins.
NO_RULES = (
    "import ast, builtins, sys; sys.path[:0] = {paths!r}\n"
    "from sdjax.sandbox.worker import rules, trace\n"
    "rules.check_text = lambda source, limit: ast.parse(source)\n"
    "trace._builtins = lambda: dict(vars(builtins))\n"
    "from sdjax.isolation.server import main; main({groups})"
)


@dataclass(frozen=True)
class Canaries:
    secret: str
    words: dict
    drop: Path
    heard: list

    def arm(self, source: str) -> str:
        return source.format(**self.words)

    def check(self, text: str) -> list[str]:
        """Return what has leaked into a text, the folder or a listener since the last call."""
        found = ["secret"] * (self.secret in text)
        found += [f"file {path.name}" for path in self.drop.iterdir()]
        found += self.heard
        self.heard.clear()
        return found


@pytest.fixture
def canaries(tmp_path_factory, monkeypatch):
    """A secret in a file and in the environment, a world-writable folder, three listeners."""
    folder = tmp_path_factory.mktemp("canaries")
    for parent in (folder, *folder.parents):  # readable by any user
        if parent.stat().st_uid == os.getuid() and parent != Path("/"):
            parent.chmod(parent.stat().st_mode | stat.S_IXOTH | stat.S_IROTH)
    secret = "SECRET" + secrets.token_hex(8)
    (folder / "secret").write_text(secret)
    (drop := folder / "drop").mkdir()
    drop.chmod(0o777)
    monkeypatch.setenv("SDJAX_CANARY", secret)
    heard: list[str] = []
    tcp = socket.create_server(("127.0.0.1", 0))
    port = tcp.getsockname()[1]
    udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    udp.bind(("127.0.0.1", port))
    local = socket.socket(socket.AF_UNIX)
    abstract = f"sdjax-canary-{secrets.token_hex(4)}"
    local.bind(f"\0{abstract}")
    local.listen()

    def listen(name, receive):
        try:
            while True:
                receive()
                heard.append(f"{name} was reached")
        except OSError:
            return

    listeners = [("tcp", tcp, lambda: tcp.accept()[0].close()), ("udp", udp, lambda: udp.recv(9))]
    listeners.append(("abstract socket", local, lambda: local.accept()[0].close()))
    for name, _, receive in listeners:
        threading.Thread(target=listen, args=(name, receive), daemon=True).start()
    words = {"secret": folder / "secret", "drop": drop, "port": port, "abstract": abstract}
    words = {name: value if name == "port" else str(value) for name, value in words.items()}
    yield Canaries(secret, words, drop, heard)
    for _, end, _ in listeners:
        end.close()


def test_catalogue_is_large_enough():
    sources = {*VALID.values(), *(source for _, source, _, _ in REFUSED), *HOSTILE.values()}
    assert len(sources) >= 120
    assert len(VALID) >= 30


@pytest.mark.parametrize("name", DETECTABLE)
def test_canaries_detect_unconfined_attacks(name, canaries, tmp_path):
    program = tmp_path / "program.py"
    program.write_text(canaries.arm(HOSTILE[name]))
    done = subprocess.run([sys.executable, program], capture_output=True, text=True, timeout=600)
    deadline = time.monotonic() + 30
    found = canaries.check(done.stdout + done.stderr)
    while not found and time.monotonic() < deadline:  # wait for the listener's thread
        time.sleep(0.02)
        found = canaries.check("")
    assert found


def _judged(sandbox, canaries) -> dict:
    """Judge all attacks; check that nothing has leaked and that the sandbox still works."""
    sources = [canaries.arm(source) for source in HOSTILE.values()]
    found = dict(zip(HOSTILE, (v for _, v in sandbox.judge_all(sources)), strict=True))
    time.sleep(0.2)  # for the listeners' threads
    everything = json.dumps([verdict.__dict__ for verdict in found.values()], default=str)
    assert canaries.check(everything) == []
    assert sandbox.judge(VALID["linear"]).verdict in ("admitted", "duplicate")
    return found


def test_attacks_are_refused_and_nothing_leaks(sandbox, canaries):
    found = _judged(sandbox, canaries)
    harmless = {"print", "a full stack"}  # no output leaves the worker
    for name, verdict in found.items():
        assert verdict.verdict == "refused" or name in harmless, (name, verdict)


@pytest.mark.slow
def test_nothing_leaks_without_text_rules(signature, canaries, monkeypatch):
    monkeypatch.setattr("sdjax.isolation.client._BOOT", NO_RULES)
    with Sandbox(signature, workers=2) as sandbox:
        assert sandbox.judge("import os\nos.getpid()\n" + VALID["linear"]).admitted  # no text rules
        found = _judged(sandbox, canaries)
        left = _below(sandbox._pool.pid)
    assert {verdict.verdict for verdict in found.values()} <= set(VERDICTS)
    assert len(left) <= 6  # only the dispatchers and the processes that compile
    for name in ("open", "tcp", "subprocess", "fork", "subclasses", "ptrace", "every descriptor"):
        assert not found[name].admitted, name
    assert found["a deadlock"].verdict == "timed out"
    assert found["ignoring the clock"].verdict != "admitted"
    assert found["a flood"].rule == "ir"


def _below(pid: int) -> list[int]:
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [p for child in map(int, children) for p in (child, *_below(child))]
