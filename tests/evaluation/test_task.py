import re
import textwrap

import pytest

from sdjax.evaluation import task as task_module
from sdjax.evaluation.task import NotGradedError, Outcome, Problem, Task, grade_output
from sdjax.evaluation.tasks.registry import find_task


class Sums(Task):
    """Answers stand behind '####'; any last number will do for the flexible reading."""

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


@pytest.mark.parametrize(
    ("output", "strict", "flexible"),
    [("#### 4", "4", "4"), ("so 4.", None, "4"), ("#### 5", "5", "5"), ("", None, None)],
)
def test_an_output_is_graded_by_both_readings(output, strict, flexible):
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


def test_an_output_ends_at_the_first_stop():
    outcome = grade_output(Sums(), Sums().problems("test")[0], "#### 4 Next: 5")
    assert (outcome.output, outcome.flexible_answer) == ("#### 4 ", "4")


def test_grading_that_is_given_up_is_a_failure_and_counts_as_wrong():
    outcome = grade_output(Sums(), Sums().problems("test")[0], "#### 4 or 99")
    assert (outcome.strict, outcome.flexible) == (True, False)
    assert outcome.failure == "grading timed out"


def test_the_example_in_the_documentation_is_a_task(tmp_path, monkeypatch):
    example = re.search(
        r"    from sdjax.*?lower\(\) == problem.answer\n", task_module.__doc__, re.S
    )
    (tmp_path / "mytasks.py").write_text(textwrap.dedent(example[0]))
    monkeypatch.chdir(tmp_path)
    task = find_task("mytasks:Riddles")
    (problem,) = task.problems("test")
    for output, strict, flexible in (("Piano.", 1, 1), ("A piano", 0, 1), ("a map", 0, 0)):
        outcome = grade_output(task, problem, output)
        assert (outcome.strict, outcome.flexible) == (strict, flexible)
