"""The launch script, as far as it goes without a TPU: what it would run, and its quoting."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "tpu" / "run.sh"


def launch(*arguments, project=None, path=None):
    environment = {key: value for key, value in os.environ.items() if key != "PROJECT"}
    if project:
        environment["PROJECT"] = project
    if path:
        environment["PATH"] = f"{path}:{environment['PATH']}"
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments], env=environment, capture_output=True, text=True
    )


def commands(*arguments, **options):
    done = launch("--dry-run", *arguments, **options)
    assert done.returncode == 0, done.stderr
    return [shlex.split(line) for line in done.stdout.splitlines()]


def test_dry_run_prints_the_four_commands():
    pack, copy, install, run = commands("slice", "us-west4-a", "configs/a.yaml", "--out", "/mnt/o")
    root = str(SCRIPT.parents[1])
    assert pack[:3] == ["tar", "-C", root]
    assert copy[:5] == ["gcloud", "compute", "tpus", "tpu-vm", "scp"]
    assert copy[5:] == [pack[-2], "slice:sdjax.tar.gz", "--zone=us-west4-a", "--worker=all"]
    ssh = ["gcloud", "compute", "tpus", "tpu-vm", "ssh", "slice", "--zone=us-west4-a"]
    assert install[:-1] == run[:-1] == [*ssh, "--worker=all"]
    assert '"./sdjax[tpu]"' in install[-1]
    assert run[-1] == (
        "--command=cd sdjax && SDJAX_COORDINATOR=auto "
        ".venv/bin/sdjax run configs/a.yaml --out /mnt/o"
    )


def test_the_project_is_passed_on():
    for command in commands("slice", "zone", "c.yaml", project="my-project")[1:]:
        assert "--project=my-project" in command


def test_arguments_reach_the_workers_whole():
    odd = ["my configs/it's.yaml", "--out", "/mnt/a b/$HOME", "--set", 'note="x" && rm -rf *']
    *_, run = commands("slice", "zone", *odd)
    remote = run[-1].removeprefix("--command=")
    assert shlex.split(remote.split("sdjax run ", 1)[1]) == odd


def test_what_it_runs_is_what_it_prints(tmp_path):
    """With a stand-in for gcloud that records its arguments and runs what a worker would."""
    record = tmp_path / "record"
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/bash\nprintf "%q " "$@" >> {record}\necho >> {record}\n')
    gcloud.chmod(0o755)
    arguments = ("slice", "zone", "my config.yaml", "--out", "/mnt/o")
    done = launch(*arguments, path=tmp_path)
    assert done.returncode == 0, done.stderr
    ran = [shlex.split(line) for line in record.read_text().splitlines()]
    printed = [command[1:] for command in commands(*arguments)[1:]]
    archive = ran[0][4]
    assert archive.endswith(".tar.gz")
    assert not Path(archive).exists()
    ran[0][4] = printed[0][4]
    assert ran == printed


def test_a_worker_that_fails_fails_the_launch(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text("#!/bin/bash\nexit 3\n")
    gcloud.chmod(0o755)
    assert launch("slice", "zone", "c.yaml", path=tmp_path).returncode == 3


@pytest.mark.parametrize("arguments", [(), ("slice",), ("slice", "zone"), ("--dry-run", "slice")])
def test_too_few_arguments_print_the_usage(arguments):
    done = launch(*arguments)
    assert done.returncode == 2
    assert "tpu/run.sh [--dry-run] NAME ZONE CONFIG" in done.stderr
    assert done.stdout == ""
