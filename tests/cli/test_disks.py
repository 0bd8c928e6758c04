"""Full disks, read-only file systems and closed outputs: one line, nothing half-written."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from jobs import evaluation, generate, merge, result, search, train_dpo, train_sft, train_warmstart

from sdjax.cli.main import main
from sdjax.core.errors import UserError
from sdjax.evaluation import results
from sdjax.io.atomic_write import write_file
from sdjax.search.store import Store

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
    # Only `eval` and `run` accept a complete output.
    message = "read-only" if command in (evaluation, search) else "already exists"
    message = "is not empty" if command is merge else message
    assert_user_error(sdjax(*command(tmp_path, out=disk / "out")), message)
    assert result(disk / "out") == written


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [("size=4k", "the disk is full"), ("size=4k,ro", "the file system is read-only")],
)
@pytest.mark.parametrize("command", ["zoo train --out", "demo --out"])
def test_long_command_that_cannot_write_fails_at_once(small_disk, command, options, message):
    assert_user_error(sdjax(*command.split(), small_disk(options) / "out"), message)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [("remount,size={}", "the disk is full"), ("ro", "the file system is read-only")],
)
def test_report_that_cannot_be_written_is_one_line(small_disk, options, message):
    disk = small_disk("size=16m")
    stored = next(Path("tests/search/stored").glob("*/run.sqlite"))
    shutil.copy(stored, disk)
    small_disk(options.format(stored.stat().st_size + 8192))
    result = CliRunner().invoke(main, ["report", str(disk)])
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"sdjax: {disk}/report.html: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in disk.iterdir()] == ["run.sqlite"]


def test_output_folder_removed_while_a_command_runs_is_reported(tmp_path):
    out = tmp_path / "out"
    with results.ResultsFolder(out, {"model": "m"}) as folder:
        shutil.rmtree(out)
        with pytest.raises(UserError, match=r"results\.jsonl: no such file or folder"):
            folder.finish([])


def test_full_disk_leaves_nothing_of_a_file(small_disk):
    disk = small_disk("size=16k")
    with pytest.raises(UserError, match=f"{disk}/file: the disk is full; free some space"):
        write_file(disk / "file", bytes(32_000))
    assert list(disk.iterdir()) == []


def test_run_folder_removed_while_a_command_runs_is_reported(tmp_path):
    stored = next(Path("tests/search/stored").glob("*/run.sqlite"))
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(stored, folder)
    with Store.open(folder, write=True) as store:
        shutil.rmtree(folder)
        with pytest.raises(UserError, match=r"run\.sqlite: was removed while the run was using it"):
            store.finish()


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
