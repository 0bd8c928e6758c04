import re
import textwrap

import numpy as np
import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation import task as task_module
from sdjax.evaluation.prompts import build_prompts
from sdjax.evaluation.task import (
    NotGradedError,
    Outcome,
    Problem,
    Task,
    grade_output,
    read_problems,
    read_training,
)
from sdjax.evaluation.tasks.registry import find_task
from sdjax.io.model_paths import zoo_models
from sdjax.io.tokenizer import load_tokenizer


class Sums(Task):
    """Task whose answers follow '####'; the flexible metric takes the last number."""

    name = "sums"
    stop = ("Next:",)

    def problems(self, split: str) -> list[Problem]:
        return [Problem(id=f"{split}/0", kind="add", question="2 + 2", answer="4")]

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question} ="

    def extract_strict(self, text: str) -> str | None:
        found = re.search(r"#### (\d+)", text)
        return found[1] if found else None

    def extract_flexible(self, text: str) -> str | None:
        found = re.findall(r"\d+", text)
        return found[-1] if found else None

    def grade(self, extracted: str, problem: Problem) -> bool:
        if extracted == "99":
            raise NotGradedError("grading timed out")
        return int(extracted) == int(problem.answer)


def test_tasks_have_no_training_problems_by_default():
    assert read_training(Sums()) == []
    (problem,) = read_problems(Sums(), "test")
    assert Sums().completion(problem) == " 4"


@pytest.mark.parametrize(
    ("output", "strict", "flexible"),
    [("#### 4", "4", "4"), ("so 4.", None, "4"), ("#### 5", "5", "5"), ("", None, None)],
)
def test_output_is_graded_by_both_metrics(output, strict, flexible):
    task = Sums()
    (problem,) = task.problems("test")
    assert grade_output(task, problem, output) == Outcome(
        problem_id="test/0",
        output=output,
        strict=strict == "4",
        flexible=flexible == "4",
        strict_answer=strict,
        flexible_answer=flexible,
    )


def test_output_is_truncated_at_the_first_stop():
    outcome = grade_output(Sums(), Sums().problems("test")[0], "#### 4 Next: 5")
    assert (outcome.output, outcome.flexible_answer) == ("#### 4 ", "4")


def test_not_graded_error_is_a_failure_and_counts_as_wrong():
    outcome = grade_output(Sums(), Sums().problems("test")[0], "#### 4 or 99")
    assert (outcome.strict, outcome.flexible) == (True, False)
    assert outcome.failure == "grading timed out"


def raised(*_):
    raise ZeroDivisionError("mine")


@pytest.mark.parametrize(
    ("method", "replaced", "failure"),
    [
        ("grade", raised, "test_task:Sums: grade raised ZeroDivisionError: mine"),
        ("grade", lambda *_: None, "grade returned NoneType, not bool"),
        ("extract_strict", raised, "extract_strict raised ZeroDivisionError: mine"),
        ("extract_flexible", lambda text: 4, "extract_flexible returned int, not str or NoneType"),
    ],
)
def test_error_in_grading_is_the_failure_of_that_output(monkeypatch, method, replaced, failure):
    task = Sums()
    monkeypatch.setattr(task, method, replaced, raising=False)
    outcome = grade_output(task, task.problems("test")[0], "#### 4")
    assert outcome.failure.endswith(failure)
    assert outcome.strict == (method == "extract_flexible")
    assert outcome.flexible == (method == "extract_strict")


def test_grade_may_return_a_numpy_bool(monkeypatch):
    task = Sums()
    monkeypatch.setattr(task, "grade", lambda *_: np.True_)
    assert grade_output(task, task.problems("test")[0], "#### 4").strict is True


@pytest.mark.parametrize(
    ("method", "replaced", "message"),
    [
        ("prompt", raised, "Sums: prompt raised ZeroDivisionError: mine .problem test/0"),
        ("prompt", lambda problem: None, "Sums: prompt returned NoneType, not str .problem test/0"),
        (
            "examples",
            lambda problem: None,
            "examples returned NoneType, not list or tuple .problem",
        ),
        ("grade", raised, "Sums: grade raised ZeroDivisionError: mine .grading the correct answer"),
    ],
)
def test_broken_task_raises_user_error_before_decoding(monkeypatch, method, replaced, message):
    task, tokenizer = Sums(), load_tokenizer(zoo_models()["seed"])
    monkeypatch.setattr(task, method, replaced)
    with pytest.raises(UserError, match=message):
        build_prompts(task, task.problems("test"), tokenizer)


@pytest.mark.parametrize(
    ("problems", "message"),
    [
        (raised, "Sums: problems raised ZeroDivisionError: mine"),
        (lambda split: None, "Sums: problems returned NoneType, not list or tuple"),
        (lambda split: ["2 + 2"], "Sums: problems returned '2 . 2', which is not a Problem"),
        (
            lambda split: [Problem(id=1, kind="", question="", answer="")],
            "TypeError: id of a problem must be a string, not 1",
        ),
    ],
)
def test_invalid_problems_raise_user_error(monkeypatch, problems, message):
    task = Sums()
    monkeypatch.setattr(task, "problems", problems)
    with pytest.raises(UserError, match=message):
        read_problems(task, "test")


def test_example_in_the_documentation_works(tmp_path, monkeypatch):
    example = re.search(
        r"    from sdjax.*?lower\(\) == problem.answer\n", task_module.__doc__, re.S
    )
    (tmp_path / "mytasks.py").write_text(textwrap.dedent(example[0]))
    monkeypatch.syspath_prepend(tmp_path)
    task = find_task("mytasks:Riddles", trust_code=True)
    (problem,) = task.problems("test")
    for output, strict, flexible in (("Piano.", 1, 1), ("A piano", 0, 1), ("a map", 0, 0)):
        outcome = grade_output(task, problem, output)
        assert (outcome.strict, outcome.flexible) == (strict, flexible)
