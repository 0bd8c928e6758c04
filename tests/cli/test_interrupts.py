"""Ctrl-C and SIGTERM at any moment of a command: status 130, one line, nothing lost."""

import shutil
import signal

import pytest
from jobs import check, evaluation, generate, merge, result, search, train_dpo, train_sft

MOMENTS = 30


def assert_interrupted(ended):
    """Assert that a command ended by a signal as it should."""
    assert ended.status == 130, ended
    assert ended.lines[-1].startswith("sdjax: interrupted"), ended
    assert not any("Traceback" in line or "Exception" in line for line in ended.lines), ended
    assert not ended.survivors, ended


@pytest.mark.parametrize("after", [0.0, 0.4, 0.8, 1.6])
def test_check_is_interrupted_in_one_line(in_terminal, tmp_path, after):
    ended = in_terminal(*check(tmp_path), after=after)
    assert_interrupted(ended)
    assert ended.lines == ["sdjax: interrupted"]


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
        ended = in_terminal(*command(parts), after=after, number=number)
        print(f"{after:.2f} s: {ended.status} after {ended.seconds - after:.2f} s")
        if ended.status != 0:
            assert_interrupted(ended)
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
