"""Splits and worked examples of tasks with data files."""

import json

import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.task import read_training
from sdjax.evaluation.tasks.registry import find_task


@pytest.fixture
def data(tmp_path):
    """gsm8k_test.jsonl with ten problems, gsm8k_train.jsonl with six."""
    for split, count in (("test", 10), ("train", 6)):
        rows = [{"question": f"{split} {i}?", "answer": f"It is.\n#### {i}"} for i in range(count)]
        (tmp_path / f"gsm8k_{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path / "gsm8k_test.jsonl"


def ids(problems):
    return [problem.id for problem in problems]


@pytest.mark.parametrize(
    ("development", "test", "first", "second"),
    [
        (None, None, range(5), range(5, 10)),
        (0, None, range(0), range(10)),
        (3, 4, range(3), range(3, 7)),
        (3, 7, range(3), range(3, 10)),  # at most
    ],
)
def test_development_comes_before_test(data, development, test, first, second):
    task = find_task("gsm8k", data=data, development=development, test=test)
    assert ids(task.problems("development")) == [f"test-{i}" for i in first]
    assert ids(task.problems("test")) == [f"test-{i}" for i in second]


def test_too_many_development_problems_raise_user_error(data):
    with pytest.raises(UserError, match=r"only 10 problems, but task.development is 11; lower it"):
        find_task("gsm8k", data=data, development=11).problems("development")


def test_too_many_test_problems_raise_user_error(data):
    message = r"task.test is 9, but only 8 of 10 problems are left after 2 for development"
    with pytest.raises(UserError, match=message):
        find_task("gsm8k", data=data, development=2, test=9).problems("test")


def test_folder_contains_both_splits(data):
    data.rename(data.with_name("test.jsonl"))
    data.with_name("gsm8k_train.jsonl").rename(data.with_name("train.jsonl"))
    task = find_task("gsm8k", data=data.parent)
    shown = task.examples(task.problems("test")[0])
    assert len(shown) == 5
    assert all(one.question.startswith("train") for one in shown)
    assert not task.notes()


def test_training_problems_are_the_train_split_without_held_out_questions(data):
    task = find_task("gsm8k", data=data)
    (first, *others) = read_training(task)
    assert ids([first, *others]) == [f"train-{i}" for i in range(6)]
    assert task.completion(first) == " It is.\n#### 0"
    assert read_training(task, held_out=[first]) == others
    data.with_name("gsm8k_train.jsonl").unlink()
    assert read_training(find_task("gsm8k", data=data)) == []


def test_gsm8k_without_train_split_uses_fixed_examples_with_a_note(data):
    data.with_name("gsm8k_train.jsonl").unlink()
    task = find_task("gsm8k", data=data)
    shown = task.examples(task.problems("test")[0])
    assert shown[0].question.startswith("There are 15 trees in the grove.")
    assert shown[0].solution.endswith("\n#### 6")
    assert len(shown) == 5
    assert "using the worked examples of gsm8k_cot" in task.notes()[0]
    many = find_task("gsm8k", data=data, shots=9)
    with pytest.raises(UserError, match="shots is 9, but gsm8k_cot has only 8 worked examples"):
        many.examples(many.problems("test")[0])
    assert not find_task("gsm8k", data=data, shots=0).notes()


def test_missing_examples_raise_user_error_with_remedy(tmp_path):
    path = tmp_path / "svamp.jsonl"
    path.write_text('{"Body": "A.", "Question": "B?", "Answer": 2.0, "Type": "Sum"}\n')
    task = find_task("svamp", data=path, development=0)
    (problem,) = task.problems("test")
    assert (problem.question, problem.answer, problem.kind) == ("A. B?", "2", "Sum")
    assert task.examples(problem) == ()
    task = find_task("svamp", data=path, development=0, shots=2)
    with pytest.raises(UserError, match=r"only 0 worked examples, but shots is 2.*x_train.jsonl"):
        task.examples(problem)


def test_math_answer_is_from_the_box_or_the_field(tmp_path):
    path = tmp_path / "math.jsonl"
    rows = [
        {"problem": "?", "solution": r"It is $\boxed{\frac{1}{2}}$.", "subject": "Algebra"},
        {"problem": "?", "solution": "It is one.", "answer": "1"},
        {"problem": "?", "solution": "It is two."},
    ]
    path.write_text("\n".join(map(json.dumps, rows[:2])))
    problems = find_task("math", data=path, development=0).problems("test")
    assert [(one.answer, one.kind) for one in problems] == [
        (r"\frac{1}{2}", "Algebra"),
        ("1", "math"),
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(UserError, match=r"line 3: no \\boxed"):
        find_task("math", data=path).problems("test")
    with pytest.raises(UserError, match="shots is 5, but minerva_math has only 4"):
        find_task("math", shots=5).examples(problems[0])
