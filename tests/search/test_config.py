import dataclasses
import re
from pathlib import Path

import pytest

from sdjax.core.errors import UserError
from sdjax.search.config import method_candidate
from sdjax.search.config_reader import PACKAGED, config_from, find_config, read_config

CONFIGS = Path(__file__).parents[2] / "configs"
OF_RUNS = [file.name for file in CONFIGS.glob("*.yaml") if not file.name.startswith("train-")]


def test_the_papers_settings_stand_in_its_config():
    config = read_config(CONFIGS / "paper-mistral-7b.yaml")
    assert (config.generation.samples, config.iterations, config.test.top_k) == (3000, 3, 15)
    assert [round(config.generation.temperature_at(t), 3) for t in (1, 2, 3)] == [1.2, 1.0, 0.857]
    assert (config.selection.winners_percent, config.selection.losers_percent) == (3, 10)
    assert config.selection.elites == 3
    training = config.training
    assert (training.beta, training.learning_rate, training.rank) == (0.01, 1e-6, 256)
    assert (config.task.development, config.task.test, config.task.shots) == (100, 1220, 5)
    assert config.seed == "openchat/openchat-3.5-1210"
    assert config.experts["expert_1"].model == "GAIR/Abel-7B-002"
    assert len(config.baselines.combinations("paper")) == 3 + 3


@pytest.mark.parametrize("name", sorted(OF_RUNS))
def test_every_shipped_config_loads_and_comes_back_from_plain_data(name):
    config = read_config(CONFIGS / name)
    assert config_from(config.to_json(), "the store") == config
    assert config.selection.settings().elites == config.selection.elites


def test_shipped_configs_are_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/demo.yaml") == PACKAGED / "demo.yaml"
    assert read_config("demo") == read_config(CONFIGS / "demo.yaml")
    (tmp_path / "demo").write_text("name: mine")
    assert find_config("demo") == Path("demo")
    with pytest.raises(UserError, match=r"elsewhere/demo.yaml: no such config.*demo"):
        find_config("elsewhere/demo.yaml")


def test_a_config_is_frozen_and_keyword_only():
    config = read_config("demo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.iterations = 4
    assert all(field.kw_only for field in dataclasses.fields(config))


def test_overrides_reach_every_depth():
    config = read_config(
        "demo",
        [
            "random=7",
            "training.enabled=false",
            "training.learning_rate=2e-5",
            "task.test=null",
            "experts.expert_1.model=zoo:other",
            "scope=['layers/0/*', 'layers/1/*']",
            "baselines.fine.ties.density=[0.25, 1]",
        ],
    )
    assert config.random == 7
    assert config.training.enabled is False
    assert config.training.learning_rate == 2e-5
    assert config.task.test is None
    assert config.experts["expert_1"].model == "zoo:other"
    assert config.scope == ("layers/0/*", "layers/1/*")
    assert config.baselines.fine["ties"]["density"] == (0.25, 1)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("generation.sample=3", r"unknown key generation.sample; did you mean samples\?"),
        ("iteration=3", r"unknown key iteration; did you mean iterations\? allowed: name,"),
        (
            "experts.expert_1.pth=3",
            r"unknown key experts.expert_1.pth; allowed: model, description",
        ),
        ("generation.samples=0", "generation.samples: must be at least 1, not 0"),
        ("generation.samples=2.5", "must be a whole number, not 2.5"),
        ("generation.samples='3'", "must be a whole number"),
        ("random=true", "random: must be a whole number, not true"),
        ("generation.top_p=1.5", "generation.top_p: must be at most 1"),
        ("generation.temperature=.inf", "must be a finite number"),
        ("training.enabled=1", "training.enabled: must be true or false, not 1"),
        ("training.reference=sed", "training.reference: must be 'policy' or 'seed', not \"sed\""),
        ("training.epochs=2", "training: give one of steps and epochs"),
        ("scope=3", "scope: must be a string or a list, not 3"),
        ("baselines.fine.ties.density=[]", "baselines.fine.ties.density: must not be empty"),
        ("evaluation.buckets=[64, 32]", "must be distinct and ascending"),
        ("evaluation.rows=500", r"rows \(500\) must be at most slots"),
        ("selection.winners_percent=95", "must sum to at most 100"),
        ("experts.expert_5={model: a}", "slots of experts must be expert_1, expert_2"),
        ('experts.expert_1.description="a\\nb"', "description must be one line"),
        ("mesh.data=0", "mesh.data: must be 1 or more, or -1 for the remaining devices"),
        ("task=null", "task: must be a mapping"),
        ("task.name.x=3", "name has no subkeys"),
        ("samples", "must be key=value"),
        ("random=[", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named_with_what_is_allowed(override, said):
    with pytest.raises(UserError, match=said) as caught:
        read_config("demo", [override])
    message = str(caught.value)
    assert f"--set {override}: " in message
    assert "\n" not in message
    assert "pydantic" not in message


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (
            "iterations: 3",
            "iteration: 3",
            r"mine.yaml, line \d+: unknown key iteration; did you mean",
        ),
        (
            "samples: 64",
            "samples: many",
            r"mine.yaml, line \d+: generation.samples: must be a whole",
        ),
        (
            "  learning_rate: 5e-4",
            "  learning_rate: -1",
            r"mine.yaml, line \d+: training.learning_rate",
        ),
        ("  samples: 64\n", "", r"mine.yaml, line \d+: the key generation.samples is missing"),
        ("name: demo\n", "", r"mine.yaml: the key name is missing"),
        ("random: 0", "random: 0\nrandom: 1", r"mine.yaml, line \d+: .*duplicate key 'random'"),
        ("random: 0", "random: [", r"mine.yaml, line \d+: not valid YAML"),
    ],
)
def test_a_wrong_file_is_named_with_its_line(tmp_path, old, new, said):
    text = (CONFIGS / "demo.yaml").read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=said):
        read_config(path)


def test_the_line_is_that_of_the_key(tmp_path):
    text = (CONFIGS / "demo.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("beta: 0.1", "beta: none"))
    with pytest.raises(UserError) as caught:
        read_config(path)
    line = int(re.search(r"line (\d+):", str(caught.value))[1])
    assert "beta: none" in path.read_text().splitlines()[line - 1]


@pytest.mark.parametrize("content", [b"", b"- a\n", b"\xff\xfe\x00", b"3"])
def test_what_is_no_config_at_all_is_a_users_error(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        read_config(path)


def test_the_length_of_a_round():
    by_steps = read_config("demo").training
    assert by_steps.steps_for(1000) == by_steps.steps
    by_epochs = read_config("demo", ["training.steps=null", "training.epochs=1.5"]).training
    assert by_epochs.steps_for(100) == 19  # ceil(1.5 * 100 / 8)
    assert by_epochs.steps_for(1) == 1


def test_a_methods_name_holds_its_hyperparameters():
    assert method_candidate("ties", {"scale": 0.6, "density": 0.4}) == (
        "method:ties(density=0.4,scale=0.6)"
    )
    assert method_candidate("linear", {}) == "method:linear()"
