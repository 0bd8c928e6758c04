"""Launch script without a TPU: the commands it runs, and their quoting."""

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
    result = launch("--dry-run", *arguments, **options)
    assert result.returncode == 0, result.stderr
    return [shlex.split(line) for line in result.stdout.splitlines()]


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


def test_project_is_passed_to_gcloud():
    for command in commands("slice", "zone", "c.yaml", project="my-project")[1:]:
        assert "--project=my-project" in command


def test_arguments_are_quoted_for_the_workers():
    arguments = ["my configs/it's.yaml", "--out", "/mnt/a b/$HOME", "--set", 'note="x" && rm -rf *']
    *_, run = commands("slice", "zone", *arguments)
    remote = run[-1].removeprefix("--command=")
    assert shlex.split(remote.split("sdjax run ", 1)[1]) == arguments


def test_dry_run_prints_the_commands_that_run(tmp_path):
    """Replace gcloud with a script that records its arguments."""
    record = tmp_path / "record"
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f'#!/bin/bash\nprintf "%q " "$@" >> {record}\necho >> {record}\n')
    gcloud.chmod(0o755)
    arguments = ("slice", "zone", "my config.yaml", "--out", "/mnt/o")
    result = launch(*arguments, path=tmp_path)
    assert result.returncode == 0, result.stderr
    ran = [shlex.split(line) for line in record.read_text().splitlines()]
    printed = [command[1:] for command in commands(*arguments)[1:]]
    archive = ran[0][4]
    assert archive.endswith(".tar.gz")
    assert not Path(archive).exists()
    ran[0][4] = printed[0][4]
    assert ran == printed


def test_failing_worker_fails_the_launch(tmp_path):
    gcloud = tmp_path / "gcloud"
    gcloud.write_text("#!/bin/bash\nexit 3\n")
    gcloud.chmod(0o755)
    assert launch("slice", "zone", "c.yaml", path=tmp_path).returncode == 3


@pytest.mark.parametrize("arguments", [(), ("slice",), ("slice", "zone"), ("--dry-run", "slice")])
def test_too_few_arguments_print_the_usage(arguments):
    result = launch(*arguments)
    assert result.returncode == 2
    assert "tpu/run.sh [--dry-run] NAME ZONE CONFIG" in result.stderr
    assert result.stdout == ""
