"""Full disks, read-only file systems and closed outputs: one line, nothing half-written."""

import subprocess
import sys

import pytest
from jobs import evaluation, generate, merge, result, search, train_dpo, train_sft, train_warmstart

WRITING = [merge, evaluation, generate, train_sft, train_dpo, train_warmstart, search]
SIZES = [f"size={size}" for size in ("4k", "24k", "120k", "600k", "1m", "16m")]


def sdjax(*arguments, **options):
    """Run a command in a process of its own."""
    command = [sys.executable, "-m", "sdjax", *map(str, arguments)]
    return subprocess.run(command, stderr=subprocess.PIPE, text=True, timeout=300, **options)


def assert_user_error(ended, message):
    """Assert that a command ended with status 2 and one line about its error."""
    assert ended.returncode == 2, (ended.returncode, ended.stderr)
    *progress, last = ended.stderr.splitlines()
    assert last.startswith("sdjax: "), ended.stderr
    assert message in last, ended.stderr
    # Progress is reported line by line if there is no terminal.
    assert all(line.startswith("sdjax: ") and message not in line for line in progress), progress


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITING)
def test_full_disk_is_reported_and_the_command_resumes(small_disk, tmp_path, command):
    whole = tmp_path / "whole"
    whole.mkdir()
    assert sdjax(*command(whole)).returncode == 0
    failures = 0
    for size in SIZES:
        disk = small_disk(size)
        ended = sdjax(*command(tmp_path, out=disk / "out"))
        if ended.returncode == 0:
            break
        assert_user_error(ended, "the disk is full; free some space")
        assert not result(disk / "out"), "appears before it is complete"
        failures += 1
    assert failures > 0
    assert result(disk / "out") == result(whole / "out")


@pytest.mark.slow
@pytest.mark.parametrize("command", WRITING)
def test_read_only_file_system_is_reported_and_the_command_resumes(small_disk, tmp_path, command):
    disk = small_disk("size=16m")
    small_disk("ro")
    assert_user_error(sdjax(*command(tmp_path, out=disk / "out")), "the file system is read-only")
    small_disk("rw,size=16m")
    assert list(disk.iterdir()) == []
    assert sdjax(*command(tmp_path, out=disk / "out")).returncode == 0
    written = result(disk / "out")
    small_disk("ro")
    ended = sdjax(*command(tmp_path, out=disk / "out"))
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert result(disk / "out") == written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [("size=4k", "the disk is full"), ("size=4k,ro", "the file system is read-only")],
)
@pytest.mark.parametrize("command", ["zoo train --out", "demo --out"])
def test_long_command_that_cannot_write_fails_at_once(small_disk, command, options, message):
    assert_user_error(sdjax(*command.split(), small_disk(options) / "out"), message)


@pytest.mark.parametrize("arguments", [["methods"], ["--help"]])
def test_closed_pipe_is_silent(arguments):
    process = subprocess.Popen(
        [sys.executable, "-m", "sdjax", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    assert process.communicate(timeout=60)[1] == b""


def test_full_disk_at_standard_output_is_one_line():
    with open("/dev/full", "w") as full:
        ended = sdjax("methods", stdout=full)
    assert_user_error(ended, "the output: the disk is full")
