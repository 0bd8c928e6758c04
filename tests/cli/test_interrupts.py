"""Ctrl-C and SIGTERM at any moment of a command: status 130, one line, nothing lost."""

import shutil
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jobs import check, evaluation, generate, merge, result, search, train_dpo, train_sft

from sdjax.cli.interrupts import NO_EXCEPTIONS

MOMENTS = 30


def assert_interrupted(attempt):
    """Assert that a command ended by a signal as it should."""
    assert attempt.status == 130, attempt
    assert attempt.lines[-1].startswith("sdjax: interrupted"), attempt
    assert not any("Traceback" in line or "Exception" in line for line in attempt.lines), attempt
    assert not attempt.survivors, attempt


PRELUDE = """
import os, signal, sys, time
from sdjax.cli.interrupts import *
handle_signals()
def terminate():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)
"""


def ended(code):
    """Return the exit status and the output of a process that interrupts itself."""
    process = subprocess.run(
        [sys.executable, "-c", PRELUDE + code], capture_output=True, text=True, timeout=600
    )
    return process.returncode, process.stdout, process.stderr


def test_a_compilation_passes_through_the_module_that_the_handler_knows():
    """Without it, an interrupt could free what XLA's compiler still reads."""
    modules = set()
    lowered = jax.jit(lambda x: jnp.tanh(x) + 0.123).lower(jnp.float32(1))
    sys.setprofile(lambda frame, event, argument: modules.add(frame.f_globals.get("__name__")))
    try:
        lowered.compile()
    finally:
        sys.setprofile(None)
    assert "jax._src.compiler" in modules & NO_EXCEPTIONS


def test_interrupt_that_a_destructor_swallows_is_repeated():
    code = """
class Swallows:
    def __del__(self):
        terminate()
try:
    with running_command(), resume_hint("try again"):
        Swallows()
        time.sleep(60)
except Interrupted as error:
    print(error)
"""
    assert ended(code) == (0, "interrupted; try again\n", "")


def test_interrupt_that_a_library_converts_is_still_one():
    code = """
try:
    with running_command(), resume_hint("try again"):
        try:
            terminate()
        except KeyboardInterrupt:
            raise RuntimeError("the callback failed")
except Interrupted as error:
    print(error)
"""
    assert ended(code) == (0, "interrupted; try again\n", "")


def test_second_signal_exits_at_once():
    code = """
with running_command(), resume_hint("try again"):
    try:
        terminate()
    finally:
        terminate()
        print("not reached")
"""
    assert ended(code) == (130, "", "sdjax: interrupted; try again\n")


def test_signal_during_an_import_exits_at_once(tmp_path):
    (tmp_path / "slow_module.py").write_text("from __main__ import terminate\nterminate()\n")
    code = f"""
sys.path.insert(0, {str(tmp_path)!r})
try:
    with running_command(), resume_hint("try again"):
        import slow_module
finally:
    print("not reached")
"""
    assert ended(code) == (130, "", "sdjax: interrupted; try again\n")


def test_signal_before_a_command_exits_at_once():
    assert ended("terminate()") == (130, "", "sdjax: interrupted\n")


def test_signal_after_a_command_is_ignored():
    code = """
with running_command():
    pass
terminate()
print("the result")
"""
    assert ended(code) == (0, "the result\n", "")


def test_held_signal_survives_the_restart():
    code = """
if "restarted" not in os.environ:
    os.environ["restarted"] = "yes"
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT, signal.SIGTERM])
    terminate()
    os.execv(sys.executable, [sys.executable, "-c", "from sdjax.cli.interrupts import *\\n"
        "handle_signals(); print('not reached')"])
"""
    assert ended(code) == (130, "", "sdjax: interrupted\n")


def test_nothing_is_imported_before_the_signals_are_blocked():
    code = (
        "import sys; before = set(sys.modules); from sdjax.__main__ import start; "
        "print(sorted(set(sys.modules) - before))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert printed.stdout == "['sdjax', 'sdjax.__main__']\n", printed


# From the moment at which the first line of `start` has been executed.
@pytest.mark.parametrize("after", [0.0, 0.05, 0.2])
@pytest.mark.parametrize("command", [("--help",), ("run", "demo", "--out", "new")], ids=str)
def test_signal_during_startup_is_one_line(in_terminal, tmp_path, command, after):
    attempt = in_terminal(*command, after=after, cwd=tmp_path)
    if attempt.status != 0:  # a short command may have ended
        assert_interrupted(attempt)
        printed = attempt.lines[:-1]  # before a signal that a busy machine has sent late
        if command == ("--help",):
            assert not printed or printed[0].startswith("Usage:")
        else:
            assert all(line.startswith("sdjax: ") for line in printed)
    assert attempt.status == 130 or command == ("--help",)


@pytest.mark.parametrize("after", [0.0, 0.4, 0.8, 1.6])
def test_check_is_interrupted_in_one_line(in_terminal, tmp_path, after):
    source = tmp_path / "endless.py"  # until the limit, so that no machine is too fast
    source.write_text("sum(range(10**12))\ndef merge_models(task_vectors):\n    return 0\n")
    attempt = in_terminal("check", source, "--json", after=after)
    assert_interrupted(attempt)
    assert attempt.lines == ["sdjax: interrupted"]


@pytest.mark.slow
@pytest.mark.parametrize("times", [2, 20])
def test_repeated_signals_end_at_once(in_terminal, tmp_path, times):
    for after in (1.0, 3.0, 5.0):
        assert_interrupted(in_terminal(*train_dpo(tmp_path), after=after, times=times))


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize(
    "command", [check, merge, evaluation, generate, train_sft, train_dpo, search]
)
def test_command_interrupted_at_30_moments_gives_the_same_result(
    in_terminal, tmp_path, command, number
):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    uninterrupted = in_terminal(*command(whole))
    assert uninterrupted.status == 0, uninterrupted
    interrupted = 0
    for moment in range(MOMENTS):
        after = uninterrupted.seconds * moment / MOMENTS
        attempt = in_terminal(*command(parts), after=after, number=number)
        print(f"{after:.2f} s: {attempt.status} after {attempt.seconds - after:.2f} s")
        if attempt.status != 0:
            assert_interrupted(attempt)
            interrupted += 1
        if result(parts / "out"):  # earlier attempts had done most of it
            assert result(parts / "out") == result(whole / "out")
            shutil.rmtree(parts)
            parts.mkdir()
    print(f"{interrupted} of {MOMENTS} interrupted; uninterrupted {uninterrupted.seconds:.1f} s")
    assert interrupted > MOMENTS / 2
    if command is not check and not result(parts / "out"):
        assert in_terminal(*command(parts)).status == 0
    assert result(parts / "out") == result(whole / "out")
