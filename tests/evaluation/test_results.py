"""`sdjax eval`: what it writes, how it goes on, and how two results are compared."""

import json
import shutil

import pytest
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.core.errors import UserError
from sdjax.evaluation import job, results
from sdjax.evaluation.comparison import compare
from sdjax.evaluation.task import Problem
from sdjax.io.model_paths import zoo_models

NAMES = {"id", "kind", "question", "answer", "prompt_sha256", "output", "failure"} | {
    *("strict", "flexible", "strict_answer", "flexible_answer")
}


def call(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def mistake(*arguments):
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    (line,) = result.output.strip().splitlines()
    return line


def rows(folder):
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    """Twelve problems of arithmetic, scored by the seed."""
    folder = tmp_path_factory.mktemp("scored") / "seed"
    result = call("eval", "zoo:seed", "--limit", 12, "--out", folder)
    assert result.exit_code == 0, result.output
    return folder


def test_a_line_a_problem_and_the_scores(scored):
    lines = rows(scored)
    assert [line["id"] for line in lines] == [f"test-{i}" for i in range(12)]
    assert all(line.keys() == NAMES for line in lines)
    scores = json.loads((scored / "scores.json").read_text())
    assert scores["problems"] == 12
    assert scores["strict"]["mean"] == sum(line["strict"] for line in lines) / 12
    assert scores["strict"]["low"] < scores["strict"]["mean"] < scores["strict"]["high"]


def test_an_evaluation_goes_on_with_what_is_missing(scored, tmp_path, monkeypatch):
    folder = tmp_path / "seed"
    shutil.copytree(scored, folder)
    whole = rows(scored)
    torn = "".join(json.dumps(line) + "\n" for line in whole[:5]) + '{"id": "test-5", "ki'
    (folder / "results.jsonl").write_text(torn)
    (folder / "scores.json").unlink()
    asked = []
    evaluate = job.evaluate

    def counted(decoder, tokenizer, params, task, problems, **rest):
        asked.extend(one.problem.id for one in problems)
        return evaluate(decoder, tokenizer, params, task, problems, **rest)

    monkeypatch.setattr(job, "evaluate", counted)
    result = call("eval", "zoo:seed", "--limit", 12, "--out", folder)
    assert result.exit_code == 0, result.output
    assert asked == [f"test-{i}" for i in range(5, 12)]
    assert rows(folder) == whole
    assert (folder / "scores.json").read_text() == (scored / "scores.json").read_text()
    asked.clear()
    result = call("eval", "zoo:seed", "--limit", 3, "--out", folder)
    assert "(3 problems)" in result.output
    assert not asked
    assert rows(folder) == whole  # nothing computed is lost


def test_an_evaluation_that_was_killed_as_it_began_begins_again(tmp_path):
    for name in ("eval.lock", ".settings.json.partial"):
        (tmp_path / name).write_text("")
    with results.Results(tmp_path, {"model": "m"}) as begun:
        assert not begun.lines


def test_one_process_writes_a_folder(tmp_path):
    with results.Results(tmp_path / "out", {"model": "m"}):
        line = mistake("eval", "zoo:seed", "--limit", 1, "--out", tmp_path / "out")
    assert "is being written by another process" in line
    with results.Results(tmp_path / "out", {"model": "m"}):
        pass


def test_a_disk_that_is_full_is_told(scored, tmp_path, monkeypatch):
    with results.Results(tmp_path / "out", {"model": "m"}) as kept:
        monkeypatch.setattr(kept, "_file", open("/dev/full", "w"))  # noqa: SIM115
        with pytest.raises(UserError, match=r"cannot be written .No space left"):
            kept.add(results.read_results(scored)[0])


def test_another_evaluation_may_not_go_on_in_the_folder(scored, tmp_path):
    assert "has model = " in mistake("eval", "zoo:reader", "--limit", 12, "--out", scored)
    line = mistake("eval", "zoo:seed", "--limit", 12, "--max-new-tokens", 9, "--out", scored)
    assert "has max_new_tokens = 64, not 9; choose another --out" in line
    (tmp_path / "mine.txt").write_text("mine")
    assert "is not empty and no evaluation" in mistake("eval", "zoo:seed", "--out", tmp_path)


def test_another_prompt_may_not_go_on_in_the_folder(tmp_path, monkeypatch):
    path, out = tmp_path / "sums.jsonl", tmp_path / "out"
    path.write_text('{"question": "1+1=", "answer": 2}\n')
    assert call("eval", "zoo:seed", "--task", path, "--out", out).exit_code == 0
    monkeypatch.chdir(tmp_path)  # by another name it is the same task
    assert call("eval", "zoo:seed", "--task", path.name, "--out", out).exit_code == 0
    path.write_text('{"question": "1+2=", "answer": 3}\n')
    line = mistake("eval", "zoo:seed", "--task", path, "--out", out)
    assert "puts problem test-0 by another prompt" in line


def test_another_answer_may_not_go_on_in_the_folder(tmp_path):
    """A verdict is of the answer that it was graded by."""
    path, out = tmp_path / "sums.jsonl", tmp_path / "out"
    path.write_text('{"question": "1+1=", "answer": 2}\n')
    assert call("eval", "zoo:seed", "--task", path, "--out", out).exit_code == 0
    path.write_text('{"question": "1+1=", "answer": 3}\n')
    line = mistake("eval", "zoo:seed", "--task", path, "--out", out)
    assert "has another question, answer or kind of problem test-0" in line


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("results.jsonl", "{}\n", "line 1: no result of an evaluation"),
        ("results.jsonl", "[1\n", "line 1: no result of an evaluation"),
        ("results.jsonl", b"\xff\n", "line 1: no result of an evaluation"),
        ("settings.json", "{", "not valid JSON"),
        ("settings.json", "[]", "not valid JSON"),
    ],
)
def test_a_damaged_folder_is_told(scored, tmp_path, file, text, message):
    folder = tmp_path / "seed"
    shutil.copytree(scored, folder)
    (folder / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert message in mistake("eval", "zoo:seed", "--limit", 12, "--out", folder)


def test_results_of_other_types_are_not_compared(scored, tmp_path):
    damaged = rows(scored)
    damaged[1]["strict"] = 5
    path = tmp_path / "results.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in damaged))
    line = mistake("eval", "--compare", scored, path)
    assert "line 2: strict is 5; it must be true or false" in line


def test_a_folder_that_cannot_be_made_is_told():
    assert "cannot be written" in mistake("eval", "zoo:seed", "--limit", 1, "--out", "/dev/null/x")


def test_two_problems_of_one_id_are_refused():
    class Twice:
        name = "twice"

        def problems(self, split):
            return [Problem(id="1", kind="k", question=text, answer="x") for text in ("a", "b")]

    with pytest.raises(UserError, match="2 problems have the id '1'"):
        job._problems(Twice(), None)


def test_two_results_are_compared_problem_by_problem(scored, tmp_path):
    better = tmp_path / "better.jsonl"
    lines = rows(scored)
    wrong = [line for line in lines if not line["strict"]]
    for line in wrong[:2]:
        line["strict"] = True
    better.write_text("".join(json.dumps(line) + "\n" for line in lines[:11]))
    result = call("eval", "--compare", scored, better)
    assert result.exit_code == 0, result.output
    head, left, strict, flexible = result.output.strip().splitlines()
    assert "11 problems in common" in head
    assert left.startswith("1 problems of A are left out")
    gained = sum(line["id"] != "test-11" for line in wrong[:2])
    assert f"B - A {gained / 11:+.3f}" in strict
    assert f"only A 0, only B {gained}, p {0.5 ** (gained - 1):.3g}" in strict
    assert "B - A +0.000 [+0.000, +0.000]  only A 0, only B 0, p 1" in flexible
    assert compare(scored, scored).count("only A 0, only B 0") == 2


def test_mistakes_of_a_comparison(scored, tmp_path):
    other = tmp_path / "other.jsonl"
    line = rows(scored)[0]
    other.write_text(json.dumps(line | {"id": "elsewhere"}))
    assert "have no problem in common" in mistake("eval", "--compare", scored, other)
    other.write_text(json.dumps(line | {"answer": "0"}))
    assert "ask something else in problem test-0" in mistake("eval", "--compare", scored, other)
    other.write_text('{"id": 1}')
    assert "line 1: needs the fields" in mistake("eval", "--compare", scored, other)
    assert "takes two results and no model" in mistake("eval", "m", "--compare", scored, other)
    line = mistake("eval", "--compare", scored, other, "--limit", 3)
    assert "takes two results and no --limit" in line
    assert "needs a MODEL, or --compare" in mistake("eval")


def test_prompts_that_fit_nowhere(tmp_path):
    path = tmp_path / "long.jsonl"
    long = {"question": "1+" * 2000 + "1=", "answer": "2001"}
    path.write_text(json.dumps(long))
    line = mistake("eval", "zoo:seed", "--task", path)
    assert "more than the model's context of" in line
    path.write_text(json.dumps(long) + '\n{"question": "1+1=", "answer": 2}')
    result = call("eval", "zoo:seed", "--task", path)
    assert "1 counted as wrong: the prompt is too long" in result.output


def test_the_longest_answer_is_the_users_or_at_most_half_of_the_context(tmp_path):
    path, model, out = tmp_path / "sums.jsonl", tmp_path / "short", tmp_path / "out"
    path.write_text('{"question": "1+1=", "answer": 2}\n')
    shutil.copytree(zoo_models()["seed"], model)
    config = json.loads((model / "config.json").read_text()) | {"max_position_embeddings": 64}
    (model / "config.json").write_text(json.dumps(config))
    result = call("eval", model, "--task", path)
    assert "at most 32 tokens, half of the model's context, not the 256 of" in result.output
    call("eval", model, "--task", path, "--max-new-tokens", 40, "--out", out)
    assert json.loads((out / "settings.json").read_text())["max_new_tokens"] == 40
    line = mistake("eval", model, "--task", path, "--max-new-tokens", 64)
    assert "with 64 new ones is more than the model's context of 64" in line


def test_chat_needs_a_template(tmp_path):
    line = mistake("eval", "zoo:seed", "--chat", "--limit", 1)
    assert "the tokenizer has no chat template" in line
    model = tmp_path / "chatty"
    shutil.copytree(zoo_models()["seed"], model)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}A:"
    (model / "chat_template.jinja").write_text(template)
    result = call("eval", model, "--chat", "--limit", 2, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "chat" in result.output
