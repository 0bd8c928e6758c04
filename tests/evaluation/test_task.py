import re

import pytest

from sdjax.evaluation.task import Outcome, Problem, Task, grade_output


class Sums:
    """Answers stand behind '####'; any last number will do for the flexible reading."""

    name = "sums"

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
        return int(extracted) == int(problem.answer)


@pytest.mark.parametrize(
    ("output", "strict", "flexible"),
    [("#### 4", True, True), ("so 4.", False, True), ("#### 5", False, False), ("", False, False)],
)
def test_an_output_is_graded_by_both_readings(output, strict, flexible):
    task: Task = Sums()
    (problem,) = task.problems("test")
    assert grade_output(task, problem, output) == Outcome(
        problem_id="test/0", output=output, strict=strict, flexible=flexible
    )
