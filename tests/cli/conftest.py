"""Commands in a pseudo-terminal, interrupted at chosen moments, and small disks."""

import contextlib
import ctypes
import dataclasses
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # makes `jobs` importable

_SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER
_CTRL_C = b"\x03"
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command in a terminal ended.

    Attributes:
        status: exit status as a shell reports it.
        lines: output without progress bars and control characters.
        seconds: duration after the handlers were installed.
        survivors: command lines of processes that it left behind.
    """

    status: int
    lines: list[str]
    seconds: float
    survivors: list[str]


@pytest.fixture
def in_terminal():
    """Return a function that runs `sdjax` in a terminal and may press Ctrl-C."""
    assert ctypes.CDLL(None).prctl(_SUBREAPER, 1, 0, 0, 0) == 0  # orphans become our children
    yield _run
    ctypes.CDLL(None).prctl(_SUBREAPER, 0, 0, 0, 0)


def _run(*arguments, after=None, number=signal.SIGINT, times=1, cwd=None):
    """Run a command.

    Args:
        arguments: the command line after `sdjax`.
        after: seconds until the signal, counted from when its handler is installed.
        number: SIGINT is sent as Ctrl-C by the terminal; any other signal to the process.
        times: number of signals, 20 ms apart.
        cwd: working directory.
    """
    before = _children(os.getpid())
    own_end, other_end = pty.openpty()
    process = subprocess.Popen(
        [
            "env",
            "--default-signal=INT,TERM",
            "setsid",
            "--ctty",
            sys.executable,
            "-m",
            "sdjax",
            *map(str, arguments),
        ],
        stdin=other_end,
        stdout=other_end,
        stderr=other_end,
        cwd=cwd,
        env={**os.environ, "PYTHONFAULTHANDLER": "1"},  # says where a crash was
    )
    os.close(other_end)
    while not _handles_signals(process.pid) and process.poll() is None:
        time.sleep(0.002)
    start, output, sent = time.monotonic(), b"", 0
    while True:
        if after is not None and sent < times and time.monotonic() - start > after + 0.02 * sent:
            sent += 1
            with contextlib.suppress(OSError):  # it has ended
                if number == signal.SIGINT:
                    os.write(own_end, _CTRL_C)
                else:
                    process.send_signal(number)
        if select.select([own_end], [], [], 0.005)[0]:
            try:
                output += os.read(own_end, 1 << 16)
            except OSError:  # closed by the last process that had it open
                break
    status = process.wait(600)
    seconds = time.monotonic() - start
    os.close(own_end)
    return Ended(
        status=128 - status if status < 0 else status,
        lines=_lines(output.decode(errors="replace")),
        seconds=seconds,
        survivors=_survivors(before),
    )


def _lines(text):
    """Return the text that remains visible, without progress bars."""
    shown = [line.split("\r")[-1] for line in _CONTROL.sub("", text).split("\r\n")]
    return [line for line in shown if line.strip() and "━" not in line]


def _handles_signals(pid):
    """Return whether a process handles or blocks SIGTERM, which Python does not by default."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    masks = re.findall(r"^Sig(?:Cgt|Blk):\s*([0-9a-f]+)$", status, re.MULTILINE)
    return any(int(mask, 16) >> (signal.SIGTERM - 1) & 1 for mask in masks)


def _survivors(before):
    """Return the command lines of new children of this process, after some time to exit."""
    deadline = time.monotonic() + 60
    while new := _children(os.getpid()) - before:
        for pid in new:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if time.monotonic() > deadline:
            break
        time.sleep(0.01)
    return [Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in new]


def _children(pid):
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return {int(child) for task in tasks for child in (task / "children").read_text().split()}


@pytest.fixture
def small_disk(tmp_path):
    """Return a function that mounts a disk of a number of bytes, or remounts it."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(options):
        remount = "remount," if os.path.ismount(disk) else ""
        command = ["mount", "-t", "tmpfs", "-o", remount + options, "tmpfs", str(disk)]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            pytest.skip(f"no right to mount a small disk: {result.stderr.strip()}")
        return disk

    yield mount
    if os.path.ismount(disk):
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
