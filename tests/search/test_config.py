import dataclasses
import json
import re
from pathlib import Path

import pytest

from sdjax.core.config import dataclass_from
from sdjax.core.config_files import CONFIG_FOLDER, find_config
from sdjax.core.errors import UserError
from sdjax.evaluation.task import read_problems
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.hub import HubError
from sdjax.search.comparison_config import ControlsConfig
from sdjax.search.config import config_from, method_entry, prompt_template, read_config, read_prompt
from sdjax.search.plan import plan_run

CONFIGS = Path(__file__).parents[2] / "configs"
RUN_CONFIGS = [file.name for file in CONFIGS.glob("*.yaml") if not file.name.startswith("train-")]


def test_paper_config_has_the_settings_of_the_paper():
    config = read_config(CONFIGS / "paper-mistral-7b.yaml")
    assert (config.generation.samples, config.iterations, config.test.top_k) == (3000, 3, 15)
    assert [round(config.generation.temperature_at(t), 3) for t in (1, 2, 3)] == [1.2, 1.0, 0.857]
    assert (config.selection.chosen_percent, config.selection.rejected_percent) == (3, 10)
    assert config.selection.elites == 3
    training = config.training
    assert (training.beta, training.learning_rate, training.rank) == (0.01, 1e-6, 256)
    assert (config.task.development, config.task.test, config.task.shots) == (100, 1219, 5)
    assert config.seed == "openchat/openchat-3.5-1210"
    assert config.experts["expert_1"].model == "GAIR/Abel-7B-002"
    assert len(config.baselines.combinations("paper")) == 3 + 3


@pytest.fixture
def hub_requests(monkeypatch):
    """Names that are asked of the Hugging Face Hub, which has none of them."""
    requests = []

    def request(name, *arguments, **options):
        requests.append(name)
        raise HubError("not in the cache")

    monkeypatch.setattr("sdjax.io.model_paths.download_model", request)
    monkeypatch.setattr("sdjax.evaluation.data.load_dataset", request)
    return requests


def test_paper_config_asks_the_hub_for_models_and_problems(hub_requests):
    """Check the comment of the config: nothing is local by default."""
    config = read_config("paper-mistral-7b", ["mesh.tensor=-1"])
    with pytest.raises(UserError, match=r"paper-mistral-7b.yaml, line \d+: seed: openchat/"):
        plan_run(config)
    assert hub_requests == ["openchat/openchat-3.5-1210"]
    with pytest.raises(UserError, match="openai/gsm8k cannot be loaded"):
        read_problems(find_task("gsm8k"), "test")
    assert hub_requests[1:] == ["openai/gsm8k"]


def test_paper_config_with_local_copies_asks_for_nothing(hub_requests):
    slots = [
        f"{experts}.expert_{n}.model" for experts in ("experts", "transfer") for n in (1, 2, 3)
    ]
    data = Path(__file__).parents[1] / "evaluation" / "harness" / "gsm8k_test.jsonl"
    local = ["seed=zoo:seed", f"task.data={data}", *(f"{slot}=zoo:reader" for slot in slots)]
    # The zoo's models and the file of problems are smaller than the paper's.
    decoding = "{slots: 1, prefill_batch: 1, buckets: [384], max_new_tokens: 64}"
    sizes = [f"generation.decoding={decoding}", f"evaluation={decoding}", "training.rank=4"]
    sizes += ["task.development=2", "task.test=2", "task.shots=0", "mesh.tensor=-1"]
    plan = plan_run(read_config("paper-mistral-7b", [*local, *sizes, "generation.prompt=short"]))
    assert len(plan.problems["test"]) == 2
    assert not hub_requests


@pytest.mark.parametrize("name", sorted(RUN_CONFIGS))
def test_shipped_config_round_trip(name):
    config = read_config(CONFIGS / name)
    assert config_from(config.to_json(), "the store") == config


def test_shipped_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_config("configs/demo.yaml") == CONFIG_FOLDER / "demo.yaml"
    assert read_config("demo") == read_config(CONFIGS / "demo.yaml")
    (tmp_path / "demo").write_text("name: mine")
    assert find_config("demo") == Path("demo")
    with pytest.raises(UserError, match=r"elsewhere/demo.yaml: config not found.*demo"):
        find_config("elsewhere/demo.yaml")
    with pytest.raises(UserError, match=r"another command; .* config: demo, paper-mistral-7b$"):
        find_config("train-dpo")


def test_prompt_file_is_next_to_the_config_and_kept_in_it(tmp_path):
    text = (CONFIG_FOLDER / "demo.yaml").read_text().replace("short-memory", "mine.jinja")
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(
        UserError, match=r"run.yaml, line \d+: generation.prompt: prompt 'mine.jinja'"
    ):
        read_config(tmp_path / "run.yaml")
    (tmp_path / "mine.jinja").write_text("Merge {{ count }}.\n")
    config = read_config(tmp_path / "run.yaml")
    (tmp_path / "mine.jinja").unlink()
    stored = config_from(json.loads(json.dumps(config.to_json())), "the store")
    assert prompt_template(stored).text == "Merge {{ count }}."
    assert read_prompt(stored) == stored
    assert read_config("demo").generation.prompt_text is None


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("generation.samples=12000000", "generation.samples: must be at most 1000000"),
        ("iterations=100000", "iterations: must be at most 1000"),
        ("sandbox.workers=100000", "sandbox.workers: must be at most 1000"),
        ("generation.memory.islands=1000000000", "memory.islands: must be at most 1000"),
        ("generation.memory.operations.improve=1e308", "improve: must be at most 1000000"),
        ("generation.memory.exploration=1e308", "exploration: must be at most 1000000"),
        ("generation.memory={parents: none}", "memory.parents: .* set generation.memory to null"),
        ("generation.memory={parents: null}", "memory.parents: .* set generation.memory to null"),
        ("training.objective=entropic", "training: nll_weight: .* set training.nll_weight to 0"),
        ("generators={grammar: {programs: x}}", "grammar is the name of the random control"),
        ("tuning.search.optimizer=gradient", "a run cannot promise a gradient .* choose auto"),
    ],
)
def test_values_that_no_run_can_have_are_errors(override, message):
    with pytest.raises(UserError, match=message):
        read_config("demo", [override])


def test_config_is_frozen_and_keyword_only():
    config = read_config("demo")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.iterations = 4
    assert all(field.kw_only for field in dataclasses.fields(config))


def test_overrides_at_every_depth():
    config = read_config(
        "demo",
        [
            "rng_seed=7",
            "training.enabled=false",
            "training.learning_rate=2e-5",
            "task.test=null",
            "experts.expert_1.model=zoo:other",
            "scope=['layers/0/*', 'layers/1/*']",
            "baselines.fine.ties.density=[0.25, 1]",
        ],
    )
    assert config.rng_seed == 7
    assert config.training.enabled is False
    assert config.training.learning_rate == 2e-5
    assert config.task.test is None
    assert config.experts["expert_1"].model == "zoo:other"
    assert config.scope == ("layers/0/*", "layers/1/*")
    assert config.baselines.fine["ties"]["density"] == (0.25, 1)


@pytest.mark.parametrize(
    ("override", "message"),
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
        ("rng_seed=true", "rng_seed: must be a whole number, not true"),
        ("generation.top_p=1.5", "generation.top_p: must be at most 1"),
        ("generation.temperature=.inf", "must be a finite number"),
        ("training.enabled=1", "training.enabled: must be true or false, not 1"),
        ("training.reference=sed", "training.reference: must be 'policy' or 'seed', not \"sed\""),
        ("training.epochs=2", "training: set exactly one of max_steps and epochs"),
        ("scope=3", "scope: must be a string or a list, not 3"),
        ("baselines.fine.ties.density=[]", "baselines.fine.ties.density: must not be empty"),
        ("evaluation.buckets=[64, 32]", "must be distinct and ascending"),
        ("evaluation.prefill_batch=500", r"prefill_batch \(500\) must be at most slots"),
        ("selection.chosen_percent=95", "must sum to at most 100"),
        ("experts.expert_5={model: a}", "slots of experts must be expert_1, expert_2"),
        ('experts.expert_1.description="a\\nb"', "description must be one line"),
        ("mesh.data=0", "mesh.data: must be 1 or more, or -1 for the remaining devices"),
        ("task=null", "task: must be a mapping"),
        ("task.name.x=3", "name has no subkeys"),
        ("samples", "must be key=value"),
        ("rng_seed=[", "not valid YAML"),
    ],
)
def test_invalid_override_error_says_what_is_allowed(override, message):
    with pytest.raises(UserError, match=message) as caught:
        read_config("demo", [override])
    text = str(caught.value)
    assert f"--set {override}: " in text
    assert "\n" not in text
    assert "pydantic" not in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "iterations: 4",
            "iteration: 3",
            r"mine.yaml, line \d+: unknown key iteration; did you mean",
        ),
        (
            "samples: 48",
            "samples: many",
            r"mine.yaml, line \d+: generation.samples: must be a whole",
        ),
        (
            "  learning_rate: 5e-5",
            "  learning_rate: -1",
            r"mine.yaml, line \d+: training.learning_rate",
        ),
        ("  samples: 48\n", "", r"mine.yaml, line \d+: the key generation.samples is missing"),
        ("name: demo\n", "", r"mine.yaml: the key name is missing"),
        (
            "rng_seed: 0",
            "rng_seed: 0\nrng_seed: 1",
            r"mine.yaml, line \d+: .*duplicate key 'rng_seed'",
        ),
        ("rng_seed: 0", "rng_seed: [", r"mine.yaml, line \d+: not valid YAML"),
    ],
)
def test_invalid_file_error_names_the_line(tmp_path, old, new, message):
    text = (CONFIGS / "demo.yaml").read_text()
    assert old in text
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace(old, new))
    with pytest.raises(UserError, match=message):
        read_config(path)


def test_error_names_the_line_of_the_key(tmp_path):
    text = (CONFIGS / "demo.yaml").read_text()
    path = tmp_path / "mine.yaml"
    path.write_text(text.replace("beta: 0.1", "beta: none"))
    with pytest.raises(UserError) as caught:
        read_config(path)
    line = int(re.search(r"line (\d+):", str(caught.value))[1])
    assert "beta: none" in path.read_text().splitlines()[line - 1]


@pytest.mark.parametrize("content", [b"", b"- a\n", b"\xff\xfe\x00", b"3"])
def test_invalid_file_raises_user_error(tmp_path, content):
    path = tmp_path / "mine.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.yaml"):
        read_config(path)


def test_number_of_training_steps():
    by_steps = read_config("demo").training
    assert by_steps.for_count(1000).max_steps == by_steps.max_steps
    by_epochs = read_config("demo", ["training.max_steps=null", "training.epochs=1.5"]).training
    assert by_epochs.for_count(100).max_steps == 19  # ceil(1.5 * 100 / 8)
    assert by_epochs.for_count(1).max_steps == 1


def test_entry_name_of_a_method():
    assert method_entry("ties", {"scale": 0.6, "density": 0.4}) == (
        "method:ties(density=0.4,scale=0.6)"
    )
    assert method_entry("linear", {}) == "method:linear()"


def test_control_that_is_listed_twice_is_refused():
    changes = {"tuned": ["weights", "ties:layers", "weights"]}
    with pytest.raises(UserError, match="'weights' is listed twice; remove one") as error:
        dataclass_from(ControlsConfig, changes, "controls")
    assert "\n" not in str(error.value)
