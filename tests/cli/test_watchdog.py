"""The process that watches a run."""

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time

import pytest

from sdjax.search.attempts import attempt_seconds, make_attempt_the_last, pending_attempt

# Executes BEHAVIOR as the first child of the watchdog, and reports what a later child finds.
SCRIPT = """
import os, signal, sqlite3, sys, time
from sdjax.cli import watchdog
folder, behavior = sys.argv[1:]
sys.argv = ["sdjax", "run", "demo", "--set", "rng_seed=1", "--trust-code", "--out=" + folder]
watchdog.POLL_SECONDS = 0.05
watchdog.watch_run()
assert "jax" not in sys.modules
if "--resume" in sys.argv:
    attempts = sqlite3.connect(folder + "/run.sqlite").execute("SELECT number FROM attempt")
    resumes = sys.argv[1:] == ["run", "--resume", folder, "--trust-limits", "--trust-code"]
    print(resumes, *attempts.fetchone(), flush=True)
    time.sleep(1)  # to load the models, which is not part of a merge
    sys.exit(3)
def begin():
    with sqlite3.connect(folder + "/run.sqlite") as connection:
        connection.execute("INSERT INTO attempt VALUES ('program:a', 'main', 1)")
def die(number):
    os.kill(os.getpid(), number)
print(os.getpid(), flush=True)
exec(behavior)
"""


# Time that a merge may take: so little that it hangs, and so much that it does not, even if the
# machine is busy.
HANGS, LASTS = 0.5, 600.0


@pytest.fixture
def folder(tmp_path):
    with sqlite3.connect(tmp_path / "run.sqlite") as connection:
        connection.execute("CREATE TABLE run (config TEXT) STRICT")
        connection.execute("CREATE TABLE attempt (entry TEXT, setting TEXT, number INTEGER) STRICT")
        connection.execute("INSERT INTO run VALUES (?)", (_config(LASTS),))
    return tmp_path


def _config(apply_seconds):
    return json.dumps({"sandbox": {"apply_seconds": apply_seconds}})


def _limit(folder, apply_seconds):
    with sqlite3.connect(folder / "run.sqlite") as connection:
        connection.execute("UPDATE run SET config = ?", (_config(apply_seconds),))


def _start(folder, behavior, **variables):
    command = [sys.executable, "-c", SCRIPT, str(folder), behavior]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("SDJAX_")} | variables
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize(
    ("behavior", "apply_seconds", "how"),
    [
        ("begin(); die(signal.SIGSEGV)", LASTS, "crashed"),
        ("begin(); die(signal.SIGABRT)", LASTS, "crashed"),
        ("begin(); time.sleep(600)", HANGS, "hung"),
    ],
)
def test_run_that_crashes_or_hangs_in_a_merge_is_resumed_without_the_program(
    folder, behavior, apply_seconds, how
):
    _limit(folder, apply_seconds)
    with _start(folder, behavior) as process:
        output, errors = process.communicate(timeout=600)
    assert output.splitlines()[1:] == ["True 2"]  # the next attempt would be the third
    assert process.returncode == 3
    assert f"sdjax: the run {how} in a program; it resumes without it" in errors


@pytest.mark.parametrize(
    ("behavior", "apply_seconds", "status"),
    [
        ("sys.exit(0)", LASTS, 0),
        ("sys.exit(2)", LASTS, 2),
        ("begin(); sys.exit(130)", LASTS, 130),
        ("die(signal.SIGSEGV)", LASTS, -signal.SIGSEGV),  # not in a merge
        ("begin(); die(signal.SIGKILL)", LASTS, -signal.SIGKILL),  # as by the system
        ("time.sleep(2)", HANGS, 0),  # longer than a merge may take
    ],
)
def test_other_ends_are_passed_on(folder, behavior, apply_seconds, status):
    _limit(folder, apply_seconds)
    with _start(folder, behavior) as process:
        output, _ = process.communicate(timeout=600)
    assert process.returncode == status
    assert len(output.splitlines()) == 1  # one child


# The watchdog reads the role while the models are loaded, before a merge can begin.
JOIN = """
import array, fcntl, termios
watchdog.report_role(is_main={})
unread = array.array("i", [1])
while unread[0]:
    time.sleep(0.01)
    fcntl.ioctl(watchdog._role_pipe, termios.FIONREAD, unread)
time.sleep(0.3)
begin()
"""


@pytest.mark.parametrize(
    ("is_main", "behavior", "apply_seconds", "status", "number"),
    [
        (True, "time.sleep(600)", HANGS, -signal.SIGKILL, 2),
        (True, "die(signal.SIGSEGV)", LASTS, -signal.SIGSEGV, 2),
        # As JAX does if another process dies.
        (True, "die(signal.SIGABRT)", LASTS, -signal.SIGABRT, 1),
        # The store is on another host.
        (False, "time.sleep(1.5); sys.exit(1)", HANGS, 1, 1),
    ],
)
def test_run_of_several_processes_is_ended_by_the_main_one(
    folder, is_main, behavior, apply_seconds, status, number
):
    _limit(folder, apply_seconds)
    with _start(folder, JOIN.format(is_main) + behavior, SDJAX_COORDINATOR="auto") as process:
        output, errors = process.communicate(timeout=600)
    assert process.returncode == status
    assert len(output.splitlines()) == 1  # one child
    remedy = f"start `sdjax run --resume {folder}` on all processes, which refuses it"
    assert (remedy in errors) == (number == 2)
    attempts = sqlite3.connect(folder / "run.sqlite").execute("SELECT number FROM attempt")
    assert attempts.fetchone() == (number,)


# A stand-in for Ctrl-Z: the time during which the run is stopped is not part of a merge.
@pytest.mark.parametrize("whole_group", [False, True], ids=["child", "both"])
def test_stopped_run_does_not_count_as_hung(folder, whole_group):
    _limit(folder, HANGS)
    # The merge takes next to no time of its own, whatever else the machine does.
    watchdog = "os.kill(os.getppid(), signal.SIGSTOP); " if whole_group else ""
    with _start(folder, f"begin(); {watchdog}die(signal.SIGSTOP); os._exit(0)") as process:
        child = int(process.stdout.readline())
        processes = [process.pid, child] if whole_group else [child]
        deadline = time.monotonic() + 60
        while any(_state(pid) != "T" for pid in processes):
            assert time.monotonic() < deadline
            time.sleep(0.01)
        time.sleep(3 * HANGS)
        for pid in processes:
            os.kill(pid, signal.SIGCONT)
        output, errors = process.communicate(timeout=600)
    assert (process.returncode, output, errors) == (0, "", "")


def _state(pid):
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(")")[2].split()[0]


def test_signals_to_the_watchdog_reach_the_run_which_dies_with_it(folder):
    wait = "signal.signal(signal.SIGTERM, lambda *_: sys.exit(130)); print(0, flush=True)\n"
    with _start(folder, wait + "time.sleep(600)") as process:
        assert [process.stdout.readline().strip().isdigit() for _ in range(2)] == [True, True]
        process.terminate()
        assert process.wait(timeout=600) == 130
    with _start(folder, "time.sleep(600)") as process:
        child = int(process.stdout.readline())
        process.kill()
        process.wait()
        deadline = time.monotonic() + 30
        while os.path.exists(f"/proc/{child}/cwd") and time.monotonic() < deadline:
            time.sleep(0.02)
        assert process.stdout.read() == ""  # end of file: nobody has it open any more


DEMO = """
import os, shutil, signal, sqlite3, sys
from pathlib import Path
from sdjax import __main__
from sdjax.cli import watchdog
sys.argv = ["sdjax", "demo", "--set", "rng_seed=1"]
assert sys.argv[1] in __main__._WATCHED
watchdog.watch_run()
if sys.argv[1] == "demo":
    folder = Path(sys.argv[3])
    folder.mkdir(parents=True)
    shutil.copy("run.sqlite", folder)
    with sqlite3.connect(folder / "run.sqlite") as connection:
        connection.execute("INSERT INTO attempt VALUES ('program:a', 'main', 1)")
    os.kill(os.getpid(), signal.SIGSEGV)
print(*sys.argv[1:])
"""


def test_demo_that_crashes_in_a_merge_is_resumed_in_its_new_folder(folder):
    command = [sys.executable, "-c", DEMO]
    result = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=600, check=False
    )
    (new,) = (folder / "runs").iterdir()
    assert result.stdout == f"run --resume runs/{new.name} --trust-limits\n", result.stderr


def test_only_the_database_may_fail_while_the_run_has_none(tmp_path):
    assert pending_attempt(tmp_path) is None
    assert attempt_seconds(tmp_path) == math.inf
    sqlite3.connect(tmp_path / "run.sqlite").close()  # no tables yet
    assert pending_attempt(tmp_path) is None
    assert not make_attempt_the_last(tmp_path)
