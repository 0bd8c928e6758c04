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
from sdjax.merging.methods.registry import algorithm
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
from sdjax.search.types import DEVELOPMENT, TEST, Entry
from sdjax.testing import random_params, tiny_config
from sdjax.tuning import candidates

STORED = Path(__file__).parent / "stored" / "jax-0.10.2" / "run.sqlite"
SLOTS = ("expert_1", "expert_2", "expert_3")
# Two families with other tensors than the zoo's, and different from each other.
FAMILIES = {
    "qwen2": {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2},
    "gemma2": {"hidden_size": 32, "intermediate_size": 40, "num_layers": 3},
}


WEIGHTS, LAYERS = "method:weights, tuned", "method:layers, tuned"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the zoo with 10 scored programs; the third best depends on the depth."""
    folder = tmp_path_factory.mktemp("stored") / "run"
    folder.mkdir()
    shutil.copy(STORED, folder)
    return folder


@pytest.fixture(scope="module")
def run_with_controls(run, tmp_path_factory):
    """The run with two tuned controls: a weight per expert, and one per expert and layer."""
    folder = tmp_path_factory.mktemp("controls") / "run"
    shutil.copytree(run, folder)
    with Store.open(folder, write=True) as store:
        solved = store.outcomes("seed", DEVELOPMENT)
        names = [f"weight[{slot}, layer {layer}]" for slot in SLOTS for layer in range(4)]
        details = {
            WEIGHTS: {"family": "weights", "values": [0.5, 0.25, 1.0], "budget": 3},
            LAYERS: {"family": "layers", "values": [0.5] * 12, "budget": 3, "names": names},
        }
        for name, detail in details.items():
            detail |= {"constants": len(detail["values"]), "grids": ["tuned"]}
            store.save(Entry(name=name, kind="method", detail=detail))
            store.save_scores(name, DEVELOPMENT, solved, complete=True)
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


def experts_in(folder):
    return {slot: str(folder / slot) for slot in SLOTS}


@pytest.mark.parametrize("family", [pytest.param("gemma2", marks=pytest.mark.slow), "qwen2"])
def test_programs_merge_models_of_other_shapes_with_their_constants(
    run_with_controls, tmp_path, family
):
    run = run_with_controls
    models = random_family(tmp_path / "models", family)
    experts = experts_in(tmp_path / "models")
    options = TransferOptions(
        base=str(tmp_path / "models" / "base"),
        top_k=3,
        limit=4,
        batch=4,
        families=("weights",),
        budget=2,
        search={"optimizer": "cmaes"},
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
    assert [row.rank for row in rows if row.kind == "program"] == [1, 2, 3]
    assert {row.problems for row in rows} == {4}
    with Store.open(run) as store:
        best = [entry.name for entry in final_ranking(store, "strict")][:3]
    assert [row.name for row in rows if row.kind == "program"] == best

    def change(algorithm):
        """Return the norm of a merge."""
        return sdjax.merge(
            models["base"], {slot: models[slot] for slot in SLOTS}, algorithm, scope="mlp"
        ).change

    # The norm of each merge is that of the program's source on these tensors.
    for name, source in data["programs"].items():
        scope: dict = {}
        exec(source, scope)
        found = applications[name].change
        np.testing.assert_allclose(found, change(scope["merge_models"]), rtol=1e-4)
    # The run's weights are applied as they are; those of its layers are not those of these models.
    untouched = f"{WEIGHTS} in the run"
    weighted = algorithm("task_arithmetic", weight=(0.5, 0.25, 1.0))
    np.testing.assert_allclose(applications[untouched].change, change(weighted), rtol=1e-4)
    assert result.refused.keys() == {f"{LAYERS} in the run"}
    assert "12 numbers, such as weight[expert_1, layer" in result.refused[f"{LAYERS} in the run"]
    methods = {row.name: row.tuned_on for row in rows if row.kind == "method"}
    assert methods["method:task_arithmetic(weight=0.6)"] in ("run", "run, here")
    assert (methods[untouched], methods[WEIGHTS]) == ("run", "here")
    assert data["tuned"][WEIGHTS]["evaluations"] == 2
    compared = {(one.program, one.method): one.tuned_on for one in results.comparisons}
    assert compared == {(program, name): on for program in best for name, on in methods.items()}
    starred = {one.best_on: one.method for one in results.comparisons if one.best_on}
    assert starred.get("run", starred.get("run, here")) == result.untouched[0]
    assert starred.get("here", starred.get("run, here")) == result.tuned[0]
    for one in results.comparisons:
        program, method = (
            np.array(data["correct"][n]["strict"]) for n in (one.program, one.method)
        )
        assert one.gain.mean == pytest.approx((program - method).mean())


@pytest.mark.slow
def test_transfer_to_the_same_experts_gives_the_scores_of_the_run(run, tmp_path):
    with Store.open(run) as store:
        config = store.config()
        expected = {one.entry: one.strict for one in store.summaries(TEST)}
    experts = {slot: config.experts[slot].model for slot in SLOTS}
    result = transfer(run, experts, tmp_path / "results", TransferOptions(top_k=2, budget=0))
    with Store.open(tmp_path / "results") as store:
        found = {row.name: row.strict.mean for row in transfer_results(store, result).rows}
    assert found == expected


@pytest.mark.slow
def test_interrupted_transfer_resumes_and_writes_its_file_at_the_end(
    run_with_controls, tmp_path, monkeypatch
):
    """Interrupt it in a search by gradient, and compare with the results of another start."""
    random_family(tmp_path / "models", "qwen2")
    out, whole = tmp_path / "transfer.json", tmp_path / "uninterrupted.json"
    arguments = [str(run_with_controls), "--base", str(tmp_path / "models" / "base")]
    arguments += ["--limit", "4", "--budget", "3", "--steps", "4"]
    for slot, model in experts_in(tmp_path / "models").items():
        arguments += ["--expert", f"{slot}={model}"]
    counts = []

    def count(module, limit=None):
        decoded, evaluate = [], module.evaluate_problems

        def evaluate_or_stop(*args, **options):
            if len(decoded) == limit:
                raise KeyboardInterrupt
            decoded.append(args)
            return evaluate(*args, **options)

        counts.append(decoded)
        return evaluate_or_stop

    def invoke(file, search_limit=None, **options):
        with monkeypatch.context() as patch:
            patch.setattr(scoring, "evaluate_problems", count(scoring))
            patch.setattr(candidates, "evaluate_problems", count(candidates, search_limit))
            return CliRunner().invoke(command, [*arguments, "--out", str(file)], **options)

    assert invoke(out, search_limit=2).exit_code != 0
    assert not out.exists()
    result = invoke(out, catch_exceptions=False)
    assert "program 16269aeb minus each method" in result.output
    assert not out.with_name(".transfer.json.store").exists()
    expected = invoke(whole, catch_exceptions=False)
    assert result.output == expected.output
    first, second, third = counts[:2], counts[2:4], counts[4:]
    assert [len(a) + len(b) for a, b in zip(first, second, strict=True)] == list(map(len, third))
    data, other = json.loads(out.read_text()), json.loads(whole.read_text())
    assert data["correct"] == other["correct"]
    assert data["tuned"][LAYERS]["values"] == other["tuned"][LAYERS]["values"]
    assert len(data["tuned"][LAYERS]["values"]) == 6
    assert set(data["correct"]) == {row["name"] for row in data["rows"]}
    again = invoke(out, search_limit=0, catch_exceptions=False)  # printed again
    assert again.output == result.output
    assert counts[-2:] == [[], []]
    arguments += ["--budget", "2"]
    with pytest.raises(UserError, match=r"transfer.json: exists; remove it"):
        invoke(out, catch_exceptions=False)


@pytest.mark.slow
def test_two_processes_give_the_results_of_one(run_with_controls, tmp_path, two_processes):
    random_family(tmp_path / "models", "qwen2")
    arguments = [run_with_controls, "--base", tmp_path / "models" / "base", "--limit", "4"]
    arguments += ["--budget", "2", "--tune", "weights"]
    for slot, model in experts_in(tmp_path / "models").items():
        arguments += ["--expert", f"{slot}={model}"]
    out = tmp_path / "two.json"
    sdjax_command = ("-c", "from sdjax.cli.main import main; main()")
    devices = ["--mesh", "data=2,tensor=2"]
    processes = two_processes(*sdjax_command, "transfer", *arguments, *devices, "--out", out)
    texts = [process.communicate(timeout=400) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], texts
    assert "minus each method" in texts[0][0]
    assert "method" not in texts[1][0]
    one = tmp_path / "one.json"
    words = [str(word) for word in arguments]
    CliRunner().invoke(command, [*words, "--out", str(one)], catch_exceptions=False)
    data, expected = json.loads(out.read_text()), json.loads(one.read_text())
    assert data["correct"] == expected["correct"]
    assert data["comparisons"] == expected["comparisons"]
    assert not list(tmp_path.glob(".*.store"))


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
            dict.fromkeys(SLOTS, "zoo:reader"),
            {"families": ("weighs",)},
            r"--tune weighs: no method or family 'weighs'; did you mean weights\?",
        ),
        (
            dict.fromkeys(SLOTS, "zoo:reader"),
            {"families": ("nope",)},
            r"--tune nope: no method or family 'nope'; families: weights, slope, layers, kinds; "
            r"`sdjax methods` lists the methods$",
        ),
        (
            dict.fromkeys(SLOTS, "zoo:reader"),
            {"families": ("weights",), "budget": 0},
            r"--budget 0 tunes nothing, so --tune weights has no effect; remove either",
        ),
        (
            dict.fromkeys(SLOTS, "zoo:reader"),
            {"budget": -3},
            r"--budget -3 is negative; give 0 or more",
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
