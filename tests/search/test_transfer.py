"""Transfer of a stored run's programs to other experts: the same family, or models of any other."""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import sdjax
from sdjax.cli.transfer import transfer as command
from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import write_model
from sdjax.io.model_paths import model_folder
from sdjax.report.transfer import read_transfer, transfer_json, transfer_results
from sdjax.search import scoring
from sdjax.search.ranking import final_ranking
from sdjax.search.score_types import Application
from sdjax.search.store import Store
from sdjax.search.transfer import (
    TransferOptions,
    plan_transfer,
    transfer,
    transfer_request,
)
from sdjax.search.types import TEST
from sdjax.testing import random_params, tiny_config

STORED = Path(__file__).parent / "stored" / "jax-0.10.2" / "run.sqlite"
SLOTS = ("expert_1", "expert_2", "expert_3")
# Two families with other tensors than the zoo's, and different from each other.
FAMILIES = {
    "qwen2": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2},
    "gemma2": {"hidden_size": 32, "intermediate_size": 40, "num_layers": 3},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the zoo with 10 scored programs; the third best depends on the depth."""
    folder = tmp_path_factory.mktemp("stored") / "run"
    folder.mkdir()
    shutil.copy(STORED, folder)
    return folder


def random_family(folder, family):
    """Write a base and three experts of a family with random weights and the zoo's tokenizer."""
    config = tiny_config(family, vocab_size=768, max_seq_len=128, **FAMILIES[family])
    base = random_params(config)
    models = {"base": base}
    for seed, slot in enumerate(SLOTS, 1):
        noise = random_params(config, seed=seed)
        models[slot] = jax.tree.map(lambda leaf, other: leaf + 0.1 * other, base, noise)
    for name, params in models.items():
        write_model(folder / name, config, params, assets_from=model_folder("zoo:seed"))
    return models


@pytest.mark.parametrize("family", [pytest.param("gemma2", marks=pytest.mark.slow), "qwen2"])
def test_programs_merge_models_of_other_shapes_with_their_constants(run, tmp_path, family):
    models = random_family(tmp_path / "models", family)
    experts = {slot: str(tmp_path / "models" / slot) for slot in SLOTS}
    options = TransferOptions(
        base=str(tmp_path / "models" / "base"), top_k=3, limit=4, batch=4, budget=0
    )
    folder = tmp_path / "results"
    result = transfer(run, experts, folder, options)
    with Store.open(folder) as store:
        results = transfer_results(store, result)
        applications = store.by_key(Application, setting="main")
        data = transfer_json(store, results, result, run)
    rows = results.rows
    winners, plan = plan_transfer(run, experts, options)
    request = transfer_request(winners, plan)
    stored = json.loads(json.dumps(data))
    assert read_transfer(stored, winners, request, plan.config) == (results, result)
    assert read_transfer(stored, winners, request | {"inputs": {}}, plan.config) is None
    assert read_transfer(stored | {"rows": [1]}, winners, request, plan.config) is None
    assert not result.refused
    assert [row.rank for row in rows if row.kind == "program"] == [1, 2, 3]
    assert {row.problems for row in rows} == {4}
    with Store.open(run) as store:
        best = [entry.name for entry in final_ranking(store, "strict")][:3]
    assert [row.name for row in rows if row.kind == "program"] == best
    # The norm of each merge is that of the program's source on these tensors.
    for name, source in data["programs"].items():
        scope: dict = {}
        exec(source, scope)
        merged = sdjax.merge(
            models["base"],
            {slot: models[slot] for slot in SLOTS},
            scope["merge_models"],
            scope="mlp",
        )
        np.testing.assert_allclose(applications[name].change, merged.change, rtol=1e-4)
    methods = {row.name: row.tuned_on for row in rows if row.kind == "method"}
    assert methods["method:task_arithmetic(weight=0.6)"] in ("run", "run, here")
    assert "here" in " ".join(methods.values())
    compared = {(one.program, one.method): one.tuned_on for one in results.comparisons}
    assert compared == {(program, name): on for program in best for name, on in methods.items()}


@pytest.mark.slow
def test_transfer_to_the_same_experts_gives_the_scores_of_the_run(run, tmp_path):
    with Store.open(run) as store:
        config = store.config()
        expected = {one.entry: one.strict for one in store.summaries(TEST)}
    experts = {slot: config.experts[slot].model for slot in SLOTS}
    result = transfer(run, experts, tmp_path / "results", TransferOptions(top_k=2))
    with Store.open(tmp_path / "results") as store:
        found = {row.name: row.strict.mean for row in transfer_results(store, result).rows}
    assert found == expected


@pytest.mark.slow
def test_interrupted_transfer_resumes_and_writes_its_file_at_the_end(run, tmp_path, monkeypatch):
    random_family(tmp_path / "models", "qwen2")
    out = tmp_path / "transfer.json"
    arguments = [str(run), "--base", str(tmp_path / "models" / "base"), "--limit", "4"]
    for slot in SLOTS:
        arguments += ["--expert", f"{slot}={tmp_path / 'models' / slot}"]
    arguments += ["--out", str(out)]
    evaluated = []
    evaluate = scoring.evaluate_problems

    def interrupted(*args, **options):
        if len(evaluated) == 5:
            raise KeyboardInterrupt
        evaluated.append(args)
        return evaluate(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(scoring, "evaluate_problems", interrupted)
        result = CliRunner().invoke(command, arguments)
    assert result.exit_code != 0
    assert not out.exists()
    counted = []
    with monkeypatch.context() as patch:
        patch.setattr(
            scoring,
            "evaluate_problems",
            lambda *args, **options: counted.append(args) or evaluate(*args, **options),
        )
        result = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert "program 16269aeb vs. the run's best method, untouched" in result.output
    assert "vs. the best method tuned here" in result.output
    data = json.loads(out.read_text())
    # Six models on the development problems, and six or seven on the test problems.
    assert len(evaluated) + len(counted) == 6 + len(data["rows"])
    assert not out.with_name(".transfer.json.store").exists()
    assert set(data["correct"]) == {row["name"] for row in data["rows"]}
    with monkeypatch.context() as patch:  # printed again, without decoding
        patch.setattr(scoring, "evaluate_problems", pytest.fail)
        again = CliRunner().invoke(command, arguments, catch_exceptions=False)
    assert again.output == result.output
    with pytest.raises(UserError, match=r"transfer.json: exists; remove it"):
        CliRunner().invoke(command, [*arguments, "--limit", "3"], catch_exceptions=False)


@pytest.mark.parametrize(
    ("experts", "options", "message"),
    [
        (
            {"expert_1": "zoo:reader"},
            {},
            r"its programs merge expert_1, expert_2, expert_3, but no model is given for "
            r"expert_2, expert_3; add --expert expert_2=MODEL --expert expert_3=MODEL",
        ),
        (
            dict.fromkeys((*SLOTS, "expert_4"), "zoo:reader"),
            {},
            r"the run has no expert expert_4; its experts are expert_1, expert_2, expert_3",
        ),
        (
            dict.fromkeys(SLOTS, "zoo:reader"),
            {"top_k": 11},
            r"the run has 10 scored programs, fewer than 11; lower --top-k",
        ),
        (
            dict.fromkeys(SLOTS, "no/such/model"),
            {},
            r"experts.expert_1.model: .*no/such/model",
        ),
    ],
)
def test_wrong_request_is_reported_in_one_line(run, tmp_path, experts, options, message):
    with pytest.raises(UserError, match=message) as error:
        transfer(run, experts, tmp_path / "results", TransferOptions(**options))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "results").exists()


def test_experts_of_another_base_are_refused(run, tmp_path):
    random_family(tmp_path / "models", "qwen2")
    experts = {slot: str(tmp_path / "models" / slot) for slot in SLOTS}
    with pytest.raises(UserError, match=r"experts must be fine-tunes of the\s+seed"):
        transfer(run, experts, tmp_path / "results", TransferOptions())
