"""`sdjax eval`: results folder, resumption, and comparison."""

import json
import re
import shutil

import jax.numpy as jnp
import pytest
from click.testing import CliRunner

from sdjax.cli.eval import _report
from sdjax.cli.main import main
from sdjax.core.errors import UserError
from sdjax.evaluation import api, results
from sdjax.evaluation.comparison import compare
from sdjax.evaluation.task import Problem
from sdjax.io.model_paths import zoo_models

NAMES = {"id", "kind", "question", "answer", "prompt_sha256", "output", "failure"} | {
    *("strict", "flexible", "strict_answer", "flexible_answer")
}


def run_cli(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def user_error(*arguments):
    result = run_cli(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    return line


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Folder of an evaluation of the seed on twelve arithmetic problems."""
    folder = tmp_path_factory.mktemp("scored") / "seed"
    result = run_cli("eval", "zoo:seed", "--limit", 12, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_folder_has_one_line_per_problem_and_the_scores(scored):
    lines = rows(scored)
    assert [line["id"] for line in lines] == [f"test-{i}" for i in range(12)]
    assert all(line.keys() == NAMES for line in lines)
    scores = json.loads((scored / "scores.json").read_text())
    assert scores["problems"] == 12
    assert scores["strict"]["mean"] == sum(line["strict"] for line in lines) / 12
    assert scores["strict"]["low"] < scores["strict"]["mean"] < scores["strict"]["high"]


def test_resumed_evaluation_computes_only_what_is_missing(scored, tmp_path, monkeypatch):
    folder = tmp_path / "seed"
    shutil.copytree(scored, folder)
    whole = rows(scored)
    truncated = "".join(json.dumps(line) + "\n" for line in whole[:5]) + '{"id": "test-5", "ki'
    (folder / "results.jsonl").write_text(truncated)
    (folder / "scores.json").unlink()
    evaluated = []
    evaluate_problems = api.evaluate_problems

    def record(decoder, tokenizer, params, task, problems, **options):
        evaluated.extend(one.problem.id for one in problems)
        return evaluate_problems(decoder, tokenizer, params, task, problems, **options)

    monkeypatch.setattr(api, "evaluate_problems", record)
    result = run_cli("eval", "zoo:seed", "--limit", 12, "--out", folder)
    assert result.exit_code == 0, result.output
    assert evaluated == [f"test-{i}" for i in range(5, 12)]
    assert rows(folder) == whole
    assert (folder / "scores.json").read_text() == (scored / "scores.json").read_text()
    evaluated.clear()
    result = run_cli("eval", "zoo:seed", "--limit", 3, "--out", folder)
    assert "(3 problems)" in result.output
    assert not evaluated
    assert rows(folder) == whole  # results beyond the limit are kept


def test_folder_of_an_evaluation_killed_at_the_start_is_usable(tmp_path):
    for name in ("eval.lock", ".settings.json.partial"):
        (tmp_path / name).write_text("")
    with results.ResultsFolder(tmp_path, {"model": "m"}) as folder:
        assert not folder.by_id


def test_locked_folder_raises_user_error(tmp_path):
    with results.ResultsFolder(tmp_path / "out", {"model": "m"}):
        line = user_error("eval", "zoo:seed", "--limit", 1, "--out", tmp_path / "out")
    assert "is being written by another process" in line
    with results.ResultsFolder(tmp_path / "out", {"model": "m"}):
        pass


def test_full_disk_raises_user_error(scored, tmp_path, monkeypatch):
    with results.ResultsFolder(tmp_path / "out", {"model": "m"}) as kept:
        monkeypatch.setattr(kept._log, "_file", open("/dev/full", "w"))  # noqa: SIM115
        with pytest.raises(UserError, match="out: the disk is full; free some space"):
            kept.add(results.read_results(scored)[0])


def test_folder_removed_during_the_run_is_noticed_at_the_next_result(scored, tmp_path):
    with results.ResultsFolder(tmp_path / "out", {"model": "m"}) as kept:
        first, second = results.read_results(scored)[:2]
        kept.add(first)
        shutil.rmtree(tmp_path / "out")
        with pytest.raises(UserError, match=r"results\.jsonl: no such file or folder; "):
            kept.add(second)


def test_other_versions_are_accepted_only_on_request(scored, tmp_path):
    folder = tmp_path / "seed"
    shutil.copytree(scored, folder)
    settings = json.loads((folder / "settings.json").read_text())
    now = settings["versions"]["jax"]
    settings["versions"]["jax"] = "0.1"
    (folder / "settings.json").write_text(json.dumps(settings))
    whole = rows(folder)
    arguments = ("eval", "zoo:seed", "--limit", 12, "--out", folder)
    assert run_cli(*arguments).exit_code == 0  # nothing is computed
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in whole[:11]))
    line = user_error(*arguments)
    assert f"started differently: jax 0.1 -> {now}; so its results may differ" in line
    result = run_cli(*arguments, "--accept-versions")
    assert result.exit_code == 0, result.output
    assert rows(folder) == whole
    settings = json.loads((folder / "settings.json").read_text())
    assert settings["accepted"] == [f"jax 0.1 -> {now}"]
    assert settings["versions"]["jax"] == now


def test_different_settings_raise_user_error(scored, tmp_path):
    assert "with model = " in user_error("eval", "zoo:reader", "--limit", 12, "--out", scored)
    line = user_error("eval", "zoo:seed", "--limit", 12, "--max-new-tokens", 9, "--out", scored)
    assert "max_new_tokens = 64, not 9; choose another --out" in line
    (tmp_path / "mine.txt").write_text("mine")
    assert "contains other files, but no evaluation" in user_error(
        "eval", "zoo:seed", "--out", tmp_path
    )


def test_different_prompt_raises_user_error(tmp_path, monkeypatch):
    path, out = tmp_path / "sums.jsonl", tmp_path / "out"
    path.write_text('{"question": "1+1=", "answer": 2}\n')
    assert run_cli("eval", "zoo:seed", "--task", path, "--out", out).exit_code == 0
    monkeypatch.chdir(tmp_path)  # a relative path names the same task
    assert run_cli("eval", "zoo:seed", "--task", path.name, "--out", out).exit_code == 0
    path.write_text('{"question": "1+2=", "answer": 3}\n')
    line = user_error("eval", "zoo:seed", "--task", path, "--out", out)
    assert "the stored prompt of problem test-0 is different" in line


def test_different_answer_raises_user_error(tmp_path):
    """Check that a grade is valid only for the answer that it was compared with."""
    path, out = tmp_path / "sums.jsonl", tmp_path / "out"
    path.write_text('{"question": "1+1=", "answer": 2}\n')
    assert run_cli("eval", "zoo:seed", "--task", path, "--out", out).exit_code == 0
    path.write_text('{"question": "1+1=", "answer": 3}\n')
    line = user_error("eval", "zoo:seed", "--task", path, "--out", out)
    assert "the stored question, answer or kind of problem test-0 is different" in line


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.jsonl", "{}\n", "line 1: not an evaluation result"),
        ("results.jsonl", "[1\n", "line 1: not an evaluation result"),
        ("results.jsonl", b"\xff\n", "line 1: not an evaluation result"),
        ("settings.json", "{", "not valid JSON"),
        ("settings.json", "[]", "not valid JSON"),
    ],
)
def test_damaged_folder_raises_user_error(scored, tmp_path, file, text, message):
    folder = tmp_path / "seed"
    shutil.copytree(scored, folder)
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in user_error("eval", "zoo:seed", "--limit", 12, "--out", folder)


def test_comparison_rejects_values_of_wrong_types(scored, tmp_path):
    damaged = rows(scored)
    damaged[1]["strict"] = 5
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in damaged))
    line = user_error("eval", "--compare", scored, path)
    assert "line 2: strict must be true or false, not 5" in line


def test_folder_that_cannot_be_created_raises_user_error():
    assert "/dev/null/x: part of the path is a file" in user_error(
        "eval", "zoo:seed", "--limit", 1, "--out", "/dev/null/x"
    )


def test_duplicate_problem_ids_raise_user_error():
    class DuplicateIds:
        name = "duplicate"

        def problems(self, split):
            return [Problem(id="1", kind="k", question=text, answer="x") for text in ("a", "b")]

    with pytest.raises(UserError, match="2 problems have the id '1'"):
        api.select_problems(DuplicateIds(), None)


def test_results_are_compared_problem_by_problem(scored, tmp_path):
    better = tmp_path / "better.jsonl"
    lines = rows(scored)
    wrong = [line for line in lines if not line["strict"]]
    for line in wrong[:2]:
        line["strict"] = True
    better.write_text("".join(json.dumps(line) + "\n" for line in lines[:11]))
    result = run_cli("eval", "--compare", scored, better)
    assert result.exit_code == 0, result.output
    head, left, strict, flexible = result.output.strip().splitlines()
    assert "11 problems in common" in head
    assert left.startswith("1 problems of A are skipped")
    gained = sum(line["id"] != "test-11" for line in wrong[:2])
    assert f"B - A {100 * gained / 11:+.1f}" in strict
    assert f"only A 0, only B {gained}, p {0.5 ** (gained - 1):.3g}" in strict
    none = r"B - A +\+0\.0 \[ *\+0\.0, +\+0\.0\]  only A 0, only B 0, p 1"
    assert re.search(none, flexible)
    assert compare(better, better).count("only A 0, only B 0") == 2
    # The columns of both lines are aligned.
    assert [m.start() for m in re.finditer(r"[\[\]]|only", strict)] == [
        m.start() for m in re.finditer(r"[\[\]]|only", flexible)
    ]


def test_metrics_that_agree_on_every_problem_are_one_column(scored, tmp_path):
    lines = rows(scored)
    for line in lines:
        line["flexible"] = line["strict"]
    same = tmp_path / "same.jsonl"
    same.write_text("".join(json.dumps(line) + "\n" for line in lines))
    *_, table, note = compare(same, same).splitlines()
    assert note == "strict and flexible accuracy are equal"
    assert table.startswith("accuracy  A ")
    evaluation = api.Evaluation(model="m", task="t", problems=tuple(results.read_results(same)))
    _, *kinds, total, note = _report(evaluation, chat=False).splitlines()
    assert note == "strict and flexible accuracy are equal"
    assert all(re.fullmatch(r"\S+ +\d+\.\d \[ *\d+\.\d, +\d+\.\d\]", x) for x in [*kinds, total])
    assert {line.index("]") for line in kinds} == {total.index("]")}
    assert evaluation.strict.in_percent().replace(" ", "") in total.replace(" ", "")


def test_dtype_batch_and_mesh_are_those_of_the_options(scored, tmp_path, monkeypatch):
    decoders = []

    class Recorded(api.Decoder):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            decoders.append((self.config.slots, self.compute_dtype, options["mesh"]))

    monkeypatch.setattr(api, "Decoder", Recorded)
    arguments = ("eval", "zoo:seed", "--limit", 3, "--batch", 2, "--mesh", "data=1")
    result = run_cli(*arguments)
    assert result.exit_code == 0, result.output
    assert decoders == [(2, jnp.float32, None)]  # on a single device there is no mesh
    first = re.search(r"^all +(?:strict +)?(\d+\.\d) \[ *\d+\.\d, +\d+\.\d\]", result.output, re.M)
    assert first is not None
    correct = sum(line["strict"] for line in rows(scored)[:3])
    assert first[1] == f"{100 * correct / 3:.1f}"
    line = user_error("eval", "zoo:seed", "--limit", 3, "--dtype", "bfloat16", "--out", scored)
    assert "contains an evaluation with dtype = 'float32', not 'bfloat16'" in line
    line = user_error("eval", "m", "--mesh", "tensor=8")
    assert "--mesh: data=1, fsdp=1, tensor=8 does not match 1 device; leave the mesh out" in line
    assert "data is already set" in user_error("eval", "m", "--mesh", "data=1,data=1")


def test_invalid_comparisons_raise_user_error(scored, tmp_path):
    other = tmp_path / "other.jsonl"
    line = rows(scored)[0]
    other.write_text(json.dumps(line | {"id": "elsewhere"}))
    assert "no problem in common" in user_error("eval", "--compare", scored, other)
    other.write_text(json.dumps(line | {"answer": "0"}))
    assert "problem test-0 has a different question or answer" in user_error(
        "eval", "--compare", scored, other
    )
    other.write_text('{"id": 1}')
    assert "line 1: needs the fields" in user_error("eval", "--compare", scored, other)
    assert "cannot be combined with model" in user_error("eval", "m", "--compare", scored, other)
    line = user_error("eval", "--compare", scored, other, "--limit", 3)
    assert "cannot be combined with --limit" in line
    assert "requires MODEL, or --compare" in user_error("eval")


def test_prompts_that_do_not_fit(tmp_path):
    path = tmp_path / "long.jsonl"
    long = {"question": "1+" * 2000 + "1=", "answer": "2001"}
    path.write_text(json.dumps(long))
    line = user_error("eval", "zoo:seed", "--task", path)
    assert "exceeds the model's context of" in line
    path.write_text(json.dumps(long) + '\n{"question": "1+1=", "answer": 2}')
    result = run_cli("eval", "zoo:seed", "--task", path)
    assert "1 counted as wrong: the prompt is too long" in result.output


def test_max_new_tokens_defaults_to_at_most_half_of_the_context(tmp_path):
    path, model, out = tmp_path / "sums.jsonl", tmp_path / "short", tmp_path / "out"
    path.write_text('{"question": "1+1=", "answer": 2}\n')
    shutil.copytree(zoo_models()["seed"], model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 64}
    (model / "config.json").write_text(json.dumps(config))
    result = run_cli("eval", model, "--task", path)
    assert "limited to 32 tokens, half of the model's maximum sequence length" in result.output
    run_cli("eval", model, "--task", path, "--max-new-tokens", 40, "--out", out)
    assert json.loads((out / "settings.json").read_text())["max_new_tokens"] == 40
    line = user_error("eval", model, "--task", path, "--max-new-tokens", 64)
    assert "with 64 new ones exceeds the model's context of 64" in line


def test_chat_requires_a_template(tmp_path):
    line = user_error("eval", "zoo:seed", "--chat", "--limit", 1)
    assert "the tokenizer has no chat template" in line
    model = tmp_path / "chatty"
    shutil.copytree(zoo_models()["seed"], model)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}A:"
    (model / "chat_template.jinja").write_text(template)
    result = run_cli("eval", model, "--chat", "--limit", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "chat" in result.output


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"versions": 3}, "3 is not a list of versions"),
        ({"versions": {"jax": 1}}, "is not a list of versions"),
        ({"accepted": {"a": "b"}}, "is not a list of versions"),
        ({"x\ny": 1}, r"an evaluation with 'x\\ny' = 1, not None"),
    ],
)
def test_settings_of_others_are_checked(tmp_path, settings, message):
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=message) as error:
        results.ResultsFolder(tmp_path, {})
    assert "\n" not in str(error.value)
