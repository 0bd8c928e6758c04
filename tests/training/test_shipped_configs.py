"""Configs of training jobs that ship with the package, and what a job writes."""

import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.core.config import read_dataclass
from sdjax.core.config_files import CONFIG_FOLDER, find_config, shipped_configs
from sdjax.core.errors import UserError
from sdjax.io.jsonl import read_jsonl
from sdjax.io.model_paths import zoo_models
from sdjax.training.config import JOBS
from sdjax.zoo.data import exercise_rows, preference_rows

PAGE = Path(__file__).parents[2] / "docs" / "training.md"


def train(*arguments):
    return CliRunner().invoke(main, ["train", *map(str, arguments)])


def documented(heading):
    """Return the names in the first column of the table below a heading of docs/training.md."""
    table = PAGE.read_text().split(f"\n{heading}\n")[1].split("\n## ")[0].split("\n### ")[0]
    cells = re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
    return {name.rstrip("/") for cell in cells for name in re.findall(r"`([^`]+)`", cell)}


def check_output(kind, out):
    """Check that docs/training.md lists every file and every metric of a finished job."""
    work_folder = out.with_name(f"{out.name}.training")
    written = {path.name for path in work_folder.iterdir()}
    assert {"metrics.jsonl", "events"} <= written <= documented("## Output")
    assert not written & {"checkpoints", "reference.npz"}  # only while training
    steps = [json.loads(line) for line in (work_folder / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps] == list(range(1, len(steps) + 1))
    for step in steps:
        if kind == "dpo":
            assert set(step) == documented("### Metrics")
        else:
            assert set(step) < documented("### Metrics")
    return steps


@pytest.mark.parametrize("kind", JOBS)
def test_shipped_configs_are_found_by_name_from_any_folder(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = f"train-{kind}"
    assert name in shipped_configs(kind)
    for path in (name, f"configs/{name}.yaml"):
        assert find_config(path, kind) == CONFIG_FOLDER / f"{name}.yaml"
    for file in shipped_configs(kind).values():
        assert isinstance(read_dataclass(JOBS[kind], file), JOBS[kind])
    with pytest.raises(UserError, match=rf"^demo: a config for another command; .*: {name}$"):
        find_config("demo", kind)


def test_errors_suggest_the_config_of_this_command():
    result = train("dpo", "train-dop")
    assert result.exit_code == 2
    assert "did you mean train-dpo?" in result.output
    assert "train-sft" not in result.output


def test_shipped_data_is_that_of_the_zoo():
    for name, rows in (
        ("exercises", exercise_rows(1000, seed=0)),
        ("preferences", preference_rows(500, seed=0)),
    ):
        assert [row for _, row in read_jsonl(CONFIG_FOLDER / f"{name}.jsonl", ())] == rows


@pytest.mark.parametrize("kind", ["sft", pytest.param("dpo", marks=pytest.mark.slow)])
def test_shipped_config_with_other_settings(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = train(
        *(kind, f"train-{kind}", "--out", "mine"),
        *("--set", "max_steps=2", "--set", "warmup_steps=1", "--set", "batch_size=2"),
    )
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith("mine: loss ")
    assert {path.name for path in tmp_path.iterdir()} == {"mine", "mine.training"}
    assert len(check_output(kind, tmp_path / "mine")) == 2


@pytest.mark.slow
@pytest.mark.parametrize("kind", JOBS)
def test_shipped_config_runs_as_it_is(kind, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = train(kind, f"train-{kind}")
    assert result.exit_code == 0, result.output
    steps = check_output(kind, tmp_path / f"trained-{kind}")
    assert steps[-1]["loss"] < 0.5 * steps[0]["loss"]


@pytest.mark.slow
def test_interrupted_job_resumes_with_other_weights_only_if_accepted(tmp_path, monkeypatch):
    shutil.copytree(zoo_models()["seed"], tmp_path / "model")
    monkeypatch.chdir(tmp_path)
    settings = ("max_steps=3", "warmup_steps=0", "checkpoint_every=1", "model=model", "rank=2")
    command = ["sft", "train-sft", *(word for one in settings for word in ("--set", one))]

    def interrupt(log, step, metrics):
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("sdjax.training.checkpoints.MetricsLog.add", interrupt)
        interrupted = train(*command)
    assert interrupted.exit_code == 130
    assert f"resume with: sdjax train {shlex.join(command)}" in interrupted.output
    shutil.copy(zoo_models()["reader"] / "model.safetensors", tmp_path / "model")
    refused = train(*command)
    assert refused.exit_code == 2
    assert re.search("started differently: model [0-9a-f]{16} -> [0-9a-f]{16};", refused.output)
    assert not (tmp_path / "trained-sft").exists()
    accepted = train(*command, "--accept-versions")
    assert accepted.exit_code == 0, accepted.output
    assert (tmp_path / "trained-sft").exists()


def test_data_is_looked_up_next_to_the_config_unless_it_is_an_override(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "rows.jsonl").write_text('{"prompt": "1"}\n')
    config = tmp_path / "configs" / "job.yaml"
    config.write_text("model: zoo:seed\nmax_steps: 1\nout: trained\ndata: rows.jsonl\n")
    monkeypatch.chdir(tmp_path)
    assert f"{tmp_path}/configs/rows.jsonl, line 1: missing" in train("sft", config).output
    result = train("sft", config, "--set", "data=rows.jsonl")
    assert result.output == (
        "sdjax: --set data=rows.jsonl: data: rows.jsonl: no such file; give a file with one JSON "
        "object per line\n"
    )
    (tmp_path / "rows.jsonl").write_text('{"completion": "1"}\n')
    assert "rows.jsonl, line 1: missing" in train("sft", config, "--set", "data=rows.jsonl").output


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("model: zoo:sede", "line 1: model: zoo:sede: no such model in the zoo"),
        ("model: zoo:seed\nadapter: nowhere", "line 2: adapter: nowhere: no such adapter folder"),
        ("model: zoo:seed\nrank: 2\nprompt: long", "line 3: prompt: prompt 'long': no such file"),
    ],
)
def test_wrong_names_are_reported_with_line_and_key(lines, message, tmp_path):
    config = tmp_path / "job.yaml"
    config.write_text(
        f"{lines}\nmax_steps: 1\nout: {tmp_path}/out\nprograms: 2\nexperts: [reads, calculates]\n"
    )
    result = train("warmstart", config)
    assert result.exit_code == 2
    assert result.output.startswith(f"sdjax: {config}, {message}")
    assert len(result.output.splitlines()) == 1
