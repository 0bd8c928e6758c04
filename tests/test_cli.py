"""Commands as a user calls them, and the user errors they report."""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
from click.testing import CliRunner

import sdjax
from sdjax.cli.main import main
from sdjax.cli.methods import list_methods
from sdjax.core.errors import UserError
from sdjax.io.hf_checkpoint import load_model, write_model
from sdjax.io.model_paths import zoo_models
from sdjax.io.peft import write_adapter
from sdjax.merging.methods.registry import methods
from sdjax.models.lora import init_adapter
from sdjax.models.tree import flatten

GOOD = """def merge_models(task_vectors):
    return sum(task_vectors.values()) / 3
"""
BAD = "import os\n\n\ndef merge_models(task_vectors):\n    return task_vectors['expert_1']\n"


def run_cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def user_error(*arguments):
    """Return the one-line message of a command that fails with status 2, without a traceback."""
    result = run_cli(*arguments)
    assert result.exit_code == 2, result.output
    assert "Traceback" not in result.output
    lines = result.output.strip().splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def test_help_lists_every_command_without_importing_jax():
    code = (
        "import sys\nfrom click.testing import CliRunner\nfrom sdjax.cli.main import main\n"
        "print(CliRunner().invoke(main, ['--help']).output)\nprint('jax' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    for command in [
        "demo",
        "run",
        "report",
        "merge",
        "tune",
        "eval",
        "check",
        "train",
        "zoo",
        "methods",
    ]:
        assert f"\n  {command} " in result.stdout
    assert result.stdout.splitlines()[-1] == "False"


def test_version_is_the_package_version():
    assert run_cli("--version").output == f"sdjax, version {sdjax.__version__}\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion_scripts(shell):
    environment = {"_SDJAX_COMPLETE": f"{shell}_source"}
    result = CliRunner().invoke(main, [], prog_name="sdjax", env=environment)
    assert "_SDJAX_COMPLETE" in result.output


@pytest.mark.parametrize("command", sorted(main.commands))
def test_help_shows_an_example(command):
    result = run_cli(command, "--help")
    assert result.exit_code == 0
    assert f"sdjax {command}" in result.output.split("Example:")[1]


def is_plain(output):
    """Return whether output has neither control characters nor lines of more than 80 columns."""
    lines = output.splitlines()
    return all(line.isprintable() and len(line) <= 80 for line in lines)


def test_methods_lists_one_method_per_line():
    output = run_cli("methods").output
    assert output.replace("\n", "").isprintable()
    listed = [line.split()[0] for line in output.split("\n\n")[0].splitlines()]
    assert listed == list(methods())
    # In a file or a pipe, summaries are complete; on a terminal, lines have its width.
    assert "average of changes made by several experts." in output
    assert max(map(len, list_methods(methods().values(), 60))) <= 60


@pytest.mark.parametrize("name", methods())
def test_methods_describes_a_method(name):
    output = run_cli("methods", name).output
    assert is_plain(output)
    method = methods()[name]
    words = output.split()
    assert set(method.formula.split()) <= set(words)
    for parameter in method.hyperparameters:
        assert {parameter.name, method.schema.recipe_key(parameter.name)} <= set(words)


def test_methods_suggests_the_nearest_name():
    assert "did you mean ties? available: linear," in user_error("methods", "tiess")


def test_zoo_list_prints_the_models():
    assert "zoo:seed" in run_cli("zoo", "list").output


def test_check_reports_admitted_and_refused_files(tmp_path):
    (tmp_path / "good.py").write_text(GOOD)
    (tmp_path / "bad.py").write_text(BAD)
    result = run_cli("check", tmp_path / "good.py", "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["verdict"] == "admitted"
    result = run_cli("check", tmp_path / "good.py", tmp_path / "bad.py", "--json")
    assert result.exit_code == 1
    bad = json.loads(result.stdout.splitlines()[1])
    assert (bad["verdict"], bad["rule"]) == ("refused", "import")


@pytest.mark.parametrize(("options", "problem_count"), [((), 6), (("--split", "test"), 3)])
def test_eval_scores_a_jsonl_file(tmp_path, options, problem_count):
    rows = [{"question": f"{a}+31=", "answer": str(a + 31)} for a in range(10, 16)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "scores"
    result = run_cli("eval", "zoo:seed", "--task", path, "--out", out, *options)
    assert result.exit_code == 0, result.output
    assert "all" in result.output
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    assert len(lines) == problem_count
    assert any(line["output"] for line in lines)


def test_eval_merges_an_adapter(tmp_path):
    folder = zoo_models()["seed"]
    config, _ = load_model(folder, paths=["final_norm"])
    fresh = init_adapter(config, jax.random.key(0), rank=2, alpha=200)
    destructive = jax.tree.map(lambda leaf: leaf + 0.1, fresh)
    write_adapter(tmp_path / "adapter", config, destructive, base="seed")
    rows = [{"question": f"{a}+31=", "answer": str(a + 31)} for a in range(40, 48)]
    path = tmp_path / "sums.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    outputs = []
    for model in ("zoo:seed", f"zoo:seed+{tmp_path / 'adapter'}"):
        out = tmp_path / str(len(outputs))
        result = run_cli("eval", model, "--task", path, "--out", out)
        assert result.exit_code == 0, result.output
        lines = (out / "results.jsonl").read_text().splitlines()
        outputs.append([json.loads(line)["output"] for line in lines])
    seed, adapted = outputs
    assert any(output.isdigit() for output in seed)
    assert not any(output.isdigit() for output in adapted)


def test_eval_rejects_data_that_is_not_utf8(tmp_path):
    path = tmp_path / "latin.jsonl"
    path.write_bytes('{"question": "ä", "answer": "1"}'.encode("latin-1"))
    assert "latin.jsonl, line 1: not JSON (not UTF-8 at byte 14)" in user_error(
        "eval", "zoo:seed", "--task", path
    )


def test_run_rejects_an_unknown_baseline_before_it_starts(tmp_path):
    wrong = "baselines.fine.nomethod.weight=[1.0]"
    assert "nomethod" in user_error("run", "demo", "--out", tmp_path / "out", "--set", wrong)
    assert not (tmp_path / "out").exists()


def test_zoo_train_refuses_a_folder_with_other_files(tmp_path):
    (tmp_path / "README.md").write_text("mine")
    assert "do not belong to a zoo" in user_error("zoo", "train", "--out", tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"


def test_eval_names_the_line_that_is_not_json(tmp_path):
    path = tmp_path / "broken.jsonl"
    path.write_text('{"question": "1+1=", "answer": "2"}\nnot json\n')
    assert "broken.jsonl, line 2: not JSON" in user_error("eval", "zoo:seed", "--task", path)


def test_merge_with_a_recipe(tmp_path):
    models = zoo_models()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "merge_method: task_arithmetic\n"
        f"base_model: {models['seed']}\n"
        "models:\n"
        f"  - {{model: {models['reader']}, parameters: {{weight: 0.7}}}}\n"
        f"  - {{model: {models['calculator']}, parameters: {{weight: 0.7}}}}\n"
    )
    result = run_cli("merge", recipe, tmp_path / "merged")
    assert result.exit_code == 0, result.output
    evaluated = run_cli("eval", tmp_path / "merged", "--limit", "8")
    assert evaluated.exit_code == 0, evaluated.output


def test_merge_with_an_algorithm_file(tmp_path):
    (tmp_path / "good.py").write_text(GOOD)
    experts = [f"--expert=expert_{i}=zoo:{name}" for i, name in ((1, "reader"), (2, "calculator"))]
    arguments = ["--algorithm", tmp_path / "good.py", "--base", "zoo:seed", *experts]
    result = run_cli("merge", *arguments, tmp_path / "merged")
    assert result.exit_code == 0, result.output
    assert f"{tmp_path / 'merged'}: merged all 38 tensors; 2.2 MB\n" in result.output
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    result = run_cli("merge", *arguments, "--scope", "mlp", tmp_path / "mlp")
    assert "merged 12 of 38 tensors (scope mlp); 26 copied from the base; " in result.output
    (tmp_path / "bad.py").write_text(BAD)
    arguments[1] = tmp_path / "bad.py"
    assert "bad.py: refused (import)" in user_error("merge", *arguments, tmp_path / "other")


def test_interrupted_merge_says_how_to_resume(tmp_path, monkeypatch):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("sdjax.merging.recipe.pipeline.merge_recipe", interrupt)
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: karcher\nmodels: [{model: a}, {model: b}]\n")
    result = run_cli("merge", recipe, tmp_path / "out")
    assert result.exit_code == 130
    assert result.output == "sdjax: interrupted; run the same command again to resume the merge\n"


def test_merge_explains_the_options_of_mergekit(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: karcher\nmodels: [{model: zoo:seed}, {model: zoo:reader}]\n")
    options = ["--cuda", "--copy-tokenizer", "--lora-merge-cache", "x", "--out-shard-size", "1M"]
    result = run_cli("merge", recipe, tmp_path / "out", *options)
    assert "--cuda has no effect: a merge runs on the accelerators that JAX" in result.output
    assert "--lora-merge-cache has no effect" in result.output
    assert "--copy-tokenizer" not in result.output
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 3
    arguments = ("merge", recipe, tmp_path / "other")
    refusal = user_error(*arguments, "--trust-remote-code")
    assert "custom code of models is copied, never run" in refusal
    assert "delete the tokenizer's files" in user_error(*arguments, "--no-copy-tokenizer")
    assert "'5X' is not a size" in run_cli(*arguments, "--out-shard-size", "5X").output


def test_quiet_merges_show_no_progress(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("merge_method: passthrough\nmodels: [{model: zoo:seed}]\n")
    assert "merge: 38 of 38 in" in run_cli("merge", recipe, tmp_path / "a").output
    lines = run_cli("merge", recipe, tmp_path / "b", "--quiet").output.splitlines()
    assert [line for line in lines if "sdjax: " not in line] == [lines[-1]]
    assert lines[-1].startswith(f"{tmp_path / 'b'}: ")


def test_merge_into_a_file_raises_user_error(tmp_path):
    (tmp_path / "out").write_text("")
    assert "out: is a file; choose a folder" in user_error("merge", "r.yaml", tmp_path / "out")


def test_merge_names_the_folders_that_were_searched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text("merge_method: karcher\nmodels: [{model: a}, {model: b}]\n")
    assert f"a: no such model folder in {tmp_path}; give" in user_error("merge", "r.yaml", "out")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["out"], "merge takes RECIPE OUT"),
        (["recipe", "out", "--scope", "nonsense"], "--scope require --algorithm FILE"),
        (["--run", ".", "--seed", "1", "out"], "--seed cannot be used with --run DIR"),
        (["--algorithm", "a.py", "recipe", "out"], "merge takes RECIPE OUT"),
        (["--algorithm", "a.py", "--run", "r", "out"], "--algorithm or --run, not both"),
        (["--base", "zoo:seed", "recipe", "out"], "require --algorithm FILE"),
        (["--rank", "2", "recipe", "out"], "--rank requires --run DIR"),
        (["--algorithm", "a.py", "out"], "--algorithm requires --base MODEL"),
        (["--algorithm", "a.py", "--base", "zoo:seed", "--expert", "x", "out"], "NAME=MODEL"),
        (["--run", "nothing", "out"], "nothing: not a run folder"),
    ],
)
def test_merge_rejects_incompatible_options(arguments, message):
    assert message in user_error("merge", *arguments)


@pytest.mark.parametrize(
    ("kind", "row", "extra"),
    [
        ("sft", {"prompt": "1+1=", "completion": "2"}, "batch_size: 1\nmax_length: 600\n"),
        pytest.param(
            *(
                "dpo",
                {"prompt": "1+1=", "chosen": "2", "rejected": "3"},
                "rank: 2\nbatch_size: 1\n",
            ),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_train_writes_a_model(tmp_path, kind, row, extra):
    long = row | {name: row[name] * 600 for name in ("completion", "chosen") if name in row}
    (tmp_path / "data.jsonl").write_text(f"{json.dumps(row)}\n{json.dumps(long)}\n")
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: zoo:seed\ndata: {tmp_path}/data.jsonl\nout: {tmp_path}/trained\n"
        "max_steps: 2\n"
        f"learning_rate: 1e-3\n{extra}"
    )
    result = run_cli("train", kind, job)
    assert result.exit_code == 0, result.output
    assert "loss" in result.output
    # The limit is the seed's max_seq_len, regardless of `max_length`.
    assert (
        "1 of 2 rows were dropped because a completion does not fit into 512 tokens"
        in result.output
    )
    files = {path.name for path in (tmp_path / "trained").iterdir()}
    # The record of the seed's training programs is copied with its weights.
    assert {"model.safetensors", "training_programs.npy", "training_programs.json.gz"} <= files
    assert "already exists" in user_error("train", kind, job)


@pytest.mark.slow
def test_train_dpo_keeps_reference_logprobs_until_it_succeeds(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "chosen": "2", "rejected": "3"}\n')
    job = tmp_path / "job.yaml"

    def write(learning_rate):
        job.write_text(
            f"model: zoo:seed\ndata: {tmp_path}/data.jsonl\nout: {tmp_path}/trained\n"
            "max_steps: 2\n"
            f"rank: 2\nbatch_size: 1\nwarmup_steps: 1\nlearning_rate: {learning_rate}\n"
        )

    write("1e30")
    assert "the trained weights' norm is inf at step 2" in user_error("train", "dpo", job)
    assert (tmp_path / "trained.training/reference.npz").exists()
    assert not (tmp_path / "trained").exists()
    monkeypatch.setattr("sdjax.training.api.reference_logprobs", None)  # not computed again
    write("1e-3")
    result = run_cli("train", "dpo", job)
    assert result.exit_code == 0, result.output
    assert not (tmp_path / "trained.training/reference.npz").exists()


def test_train_dpo_computes_reference_logprobs_again_for_other_weights(tmp_path, monkeypatch):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "chosen": "2", "rejected": "3"}\n')
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {tmp_path}/model\ndata: {tmp_path}/data.jsonl\nout: {tmp_path}/trained\n"
        "max_steps: 1\nrank: 2\nbatch_size: 1\n"
    )
    shutil.copytree(zoo_models()["seed"], tmp_path / "model")
    stored = []

    def stop_before_the_first_checkpoint(*_args, **_options):
        with np.load(tmp_path / "trained.training/reference.npz") as arrays:
            stored.append(arrays["array"])
        raise UserError("stopped")

    monkeypatch.setattr("sdjax.training.api._fit", stop_before_the_first_checkpoint)
    assert "sdjax: stopped" in run_cli("train", "dpo", job).output
    shutil.rmtree(tmp_path / "model")
    shutil.copytree(zoo_models()["reader"], tmp_path / "model")
    assert "sdjax: stopped" in run_cli("train", "dpo", job).output
    assert not np.array_equal(*stored)
    monkeypatch.setattr("sdjax.training.api.reference_logprobs", None)  # not computed again
    assert "sdjax: stopped" in run_cli("train", "dpo", job).output
    np.testing.assert_array_equal(stored[1], stored[2])


def test_bfloat16_compute_dtype_leaves_frozen_weights_unrounded(tmp_path):
    config, params = load_model(zoo_models()["seed"], dtype=np.float32)
    finer = jax.tree.map(lambda x: x * 1.0001, params)  # not representable in bfloat16
    write_model(tmp_path / "fine", config, finer, assets_from=zoo_models()["seed"])
    (tmp_path / "data.jsonl").write_text('{"prompt": "1+1=", "completion": "2"}\n')
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: {tmp_path}/fine\ndata: {tmp_path}/data.jsonl\nout: {tmp_path}/trained\n"
        "max_steps: 1\n"
        "rank: 2\ntarget_modules: [attn.q_proj]\ncompute_dtype: bfloat16\n"
    )
    result = run_cli("train", "sft", job)
    assert result.exit_code == 0, result.output
    trained = flatten(load_model(tmp_path / "trained")[1])
    for path, leaf in flatten(finer).items():
        assert ("q_proj" in path) or np.array_equal(leaf, trained[path]), path


@pytest.mark.slow
def test_train_warmstart_writes_its_programs_next_to_the_weights(tmp_path):
    job = tmp_path / "job.yaml"
    job.write_text(
        f"model: zoo:seed\nout: {tmp_path}/warm\nexperts: [reads, calculates]\nprompt: short\n"
        "programs: 8\nmax_steps: 2\nbatch_size: 4\nrank: 2\n"
    )
    result = run_cli("train", "warmstart", job)
    assert result.exit_code == 0, result.output
    assert "8 candidates, prompt of" in result.output
    assert re.search(r"; \d new training programs, \d{5} with those of the start", result.output)
    files = {path.name for path in (tmp_path / "warm").iterdir()}
    assert {"model.safetensors", "training_programs.npy", "training_programs.json.gz"} <= files


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ("save: adapter\nrank: null\n", "save: adapter requires rank"),
        ("adapter: nowhere\n", "nowhere: no such adapter folder"),
        ("adapter: nowhere\nrank: 4\n", "rank: set by the adapter to start from"),
        ("reference: seed\nrank: null\n", "reference: seed requires an adapter"),
        ("mesh: {fsdp: 8}\n", "fsdp=8, tensor=1 does not match 1 device;"),
        ("target_modules: [attn.x]\n", "must be one of attn.q_proj"),
        ("loss: hinge\n", "must be one of sigmoid, ipo"),
    ],
)
def test_train_rejects_invalid_configs(tmp_path, lines, message):
    (tmp_path / "data.jsonl").write_text('{"prompt": "1", "chosen": "2", "rejected": "3"}\n')
    (tmp_path / "job.yaml").write_text(
        f"model: zoo:seed\ndata: {tmp_path}/data.jsonl\nout: {tmp_path}/out\nmax_steps: 1\n{lines}"
    )
    assert message in user_error("train", "dpo", tmp_path / "job.yaml")


def test_train_rejects_an_unknown_key(tmp_path):
    (tmp_path / "job.yaml").write_text("model: zoo:seed\nstepps: 3\n")
    assert "stepps" in user_error("train", "sft", tmp_path / "job.yaml")


class TestRunUserErrors:
    """User errors of `sdjax run`."""

    def test_missing_config(self, tmp_path):
        assert "demo" in user_error("run", "nothing.yaml", "--out", tmp_path / "run")

    def test_unknown_key(self, tmp_path):
        line = user_error("run", "demo", "--out", tmp_path / "run", "--set", "generation.sample=3")
        assert "generation.sample" in line
        assert "did you mean samples?" in line

    def test_wrong_value(self, tmp_path):
        line = user_error("run", "demo", "--out", tmp_path / "run", "--set", "iterations=none")
        assert "iterations: must be a whole number" in line

    def test_missing_model(self, tmp_path):
        line = user_error("run", "demo", "--out", tmp_path / "run", "--set", "seed=/nowhere")
        assert "/nowhere: no such model folder" in line

    def test_truncated_weights_file(self, tmp_path):
        seed = tmp_path / "seed"
        shutil.copytree(zoo_models()["seed"], seed)
        weights = seed / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100_000])
        line = user_error("run", "demo", "--out", tmp_path / "run", "--set", f"seed={seed}")
        assert "model.safetensors" in line

    def test_expert_of_a_different_shape(self, tmp_path):
        expert = tmp_path / "expert"
        shutil.copytree(zoo_models()["reader"], expert)
        config = json.loads((expert / "config.json").read_text())
        (expert / "config.json").write_text(json.dumps(config | {"intermediate_size": 500}))
        line = user_error(
            "run", "demo", "--out", tmp_path / "run", "--set", f"experts.expert_1.model={expert}"
        )
        assert "layers/0/mlp/" in line
        assert str(expert) in line

    def test_folder_that_is_not_empty(self, tmp_path):
        (tmp_path / "file").write_text("mine")
        line = user_error("run", "demo", "--out", tmp_path)
        assert ": not empty" in line
        assert (tmp_path / "file").read_text() == "mine"

    def test_nothing_to_resume(self, tmp_path):
        assert "not a run folder" in user_error("run", "--resume", tmp_path)
