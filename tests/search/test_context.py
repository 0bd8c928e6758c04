"""Loading of a run's models, task and prompts."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
import yaml
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.core.config_files import find_config
from sdjax.core.errors import UserError
from sdjax.decoding.config import DecoderConfig
from sdjax.io.hf_checkpoint import load_config
from sdjax.io.model_paths import zoo_models
from sdjax.io.peft import write_adapter
from sdjax.io.training_programs import TrainingPrograms
from sdjax.models.lora import init_adapter
from sdjax.programs.signature import model_signature
from sdjax.search.config import TaskConfig, read_config
from sdjax.search.context import build_context
from sdjax.search.plan import plan_run
from sdjax.search.store import Store
from sdjax.training.warmstart import signature_digest


@pytest.fixture
def sums(small_config, tmp_path):
    """The small run on a file of six sums, with worked examples in a second file."""
    for split, count in (("test", 6), ("train", 4)):
        rows = [{"question": f"{split} 1+{i}=", "answer": 1 + i} for i in range(count)]
        (tmp_path / f"sums_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    task = TaskConfig(
        name=str(tmp_path / "sums_test.jsonl"), development=2, confirmation=0, shots=2
    )
    sizes = DecoderConfig(slots=4, prefill_batch=4, buckets=(96,), max_new_tokens=8)
    return dataclasses.replace(small_config, task=task, evaluation=sizes)


def test_worked_examples_and_splits(sums):
    context = build_context(sums)
    assert [one.problem.id for one in context.problems["development"]] == ["test-0", "test-1"]
    assert len(context.problems["test"]) == 4
    for one in context.problems["test"]:
        *examples, question = one.text.split("\n\n")
        assert len(examples) == 2
        assert all(example.startswith("train 1+") for example in examples)
        assert question == f"{one.problem.question}\nA:"


@pytest.mark.parametrize(("confirmation", "count"), [(None, 15), (5, 5), (0, 0)])
def test_confirmation_problems_are_disjoint_from_those_of_the_search(
    small_config, confirmation, count
):
    def problems_with(confirmation):
        task = dataclasses.replace(small_config.task, confirmation=confirmation)
        return plan_run(dataclasses.replace(small_config, task=task)).problems

    everything = problems_with(0)["development"]
    problems = problems_with(confirmation)
    search = [one.problem.id for one in problems["development"]]
    confirmed = [one.problem.id for one in problems.get("confirmation", ())]
    assert len(confirmed) == count
    assert ("confirmation" in problems) == bool(count)
    assert sorted(search + confirmed) == sorted(one.problem.id for one in everything)


def test_confirmation_leaves_problems_for_the_search(small_config):
    task = dataclasses.replace(small_config.task, confirmation=30)
    with pytest.raises(UserError, match=r"task.confirmation: 30 of 30 development problems cannot"):
        plan_run(dataclasses.replace(small_config, task=task))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("task", {"test": 12_000_000}, r"task.test is 12000000, but there are only 100000 test"),
        ("task", {"development": 100_001}, r"task.development is 100001, but there are only 1000"),
        (
            "evaluation",
            {"slots": 10**9, "prefill_batch": 1},
            r"decoding 1000000000 sequences of up to 59 tokens at a time requires [\d,.]+ GB",
        ),
        ("evaluation", {"max_new_tokens": 10**6}, "maximum sequence length is 512"),
        (
            "training",
            {"rank": 10**6},
            "rank is 1000000, but no adapted projection has a rank above",
        ),
    ],
)
def test_counts_beyond_what_is_possible_are_errors_at_once(small_config, section, changes, message):
    changed = dataclasses.replace(getattr(small_config, section), **changes)
    with pytest.raises(UserError, match=message):
        build_context(dataclasses.replace(small_config, **{section: changed})).new_adapter()


def test_generator_starts_from_an_adapter(small_config, tmp_path):
    folder = tmp_path / "warm"
    model = load_config(zoo_models()["seed"])
    initial = init_adapter(model, jax.random.key(7), rank=2, alpha=small_config.training.alpha)
    trained = jax.tree.map(lambda leaf: leaf + 0.1, initial)
    signature = signature_digest(model_signature(model, small_config.slots, "mlp"))
    files = TrainingPrograms.create(["x"], [5], signature=signature).write(tmp_path / "files")
    write_adapter(folder, model, trained, base="zoo:seed", extra_files=files)
    config = dataclasses.replace(small_config, generator=str(folder))
    context = build_context(config)
    jax.tree.map(np.testing.assert_array_equal, context.new_adapter().factors, trained.factors)
    assert context.was_trained_on(f"{5:016x}")
    assert not context.was_trained_on(f"{6:016x}")
    wider = dataclasses.replace(config, training=dataclasses.replace(config.training, rank=4))
    with pytest.raises(UserError, match=r"warm: has rank 2 .*, but training.rank is 4"):
        build_context(wider)


def with_task(config, **changes):
    return dataclasses.replace(config, task=dataclasses.replace(config.task, **changes))


def test_unusable_prompts_raise_user_error_before_the_run(sums):
    with pytest.raises(UserError, match="no chat template"):
        build_context(with_task(sums, prompt="chat"))
    with pytest.raises(UserError, match="no test problems"):
        build_context(with_task(sums, development=6))
    small = DecoderConfig(slots=4, prefill_batch=4, buckets=(8,), max_new_tokens=8)
    with pytest.raises(UserError, match=r"every development prompt exceeds .* 8"):
        build_context(dataclasses.replace(sums, evaluation=small))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("seed", "zoo:sed", "no such model in the zoo"),
        ("experts.expert_2.model", "zoo:calculater", "no such model in the zoo"),
        ("transfer.expert_3.model", "none/here/at/all", "no such model folder"),
        ("generator", "zoo:none", "no such model in the zoo"),
        ("task.name", "arithmetics", "unknown task 'arithmetics'"),
        ("task.name", "mytasks:Riddles", "--trust-code"),
        ("scope", "nothing/*", "matches no tensor"),
        ("generation.prompt", "shrot", "shrot"),
        ("generation.decoding.buckets", "[4]", "add a bucket of at least"),
        ("evaluation.max_new_tokens", "100000", "maximum sequence length"),
        ("baselines.paper.tise", "{density: [0.2]}", "no merge method 'tise'"),
        ("baselines.fine.ties", "{densty: [0.2]}", "densty"),
    ],
)
def test_wrong_names_are_reported_with_their_line(tmp_path, key, value, message):
    file = tmp_path / "mine.yaml"
    data = yaml.safe_load(find_config("demo").read_text())
    *parents, name = key.split(".")
    section = data
    for parent in parents:
        section = section[parent]
    section[name] = yaml.safe_load(value)
    file.write_text(yaml.safe_dump(data))
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        plan_run(read_config(file))
    text = str(caught.value)
    place = re.match(rf"{re.escape(str(file))}, line (\d+): (\S+): ", text)
    assert place, text
    assert key.startswith(place[2])
    line = file.read_text().splitlines()[int(place[1]) - 1]
    assert line.strip().startswith((name, place[2].rpartition(".")[2])), line
    assert "\n" not in text


def test_a_stored_run_imports_no_module_next_to_it(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    config = read_config("demo", ["task.name=adjacent:Task"])
    Store.create(folder, config=config.to_json(), versions={}, layers=()).close()
    (folder / "adjacent.py").write_text("raise SystemExit('ran')\n")
    monkeypatch.chdir(folder)
    for options, message in (((), "--trust-code"), (("--trust-code",), "PYTHONPATH")):
        command = ["run", "--resume", str(folder), "--dry-run", *options]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2, result.output
        assert message in result.output.splitlines()[-1]
        assert "Traceback" not in result.output
