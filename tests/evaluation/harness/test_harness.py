"""Parity of prompts, extraction and grades with lm-evaluation-harness (make_references.py)."""

import json
from pathlib import Path

import pytest

from sdjax.evaluation.prompts import chat_messages, plain_prompt
from sdjax.evaluation.task import Problem, grade_output
from sdjax.evaluation.tasks.registry import find_task

HERE = Path(__file__).parent
PROMPTS = json.loads((HERE / "prompts.json").read_text(encoding="utf-8"))
GRADES = json.loads((HERE / "grades.json").read_text(encoding="utf-8"))

# Outputs whose strict grade differs from the harness's `exact_match`. The harness treats two lists
# as equal if their first numbers are, and 0/0 as 0; math-verify, which we use, understands
# percentages, sets, matrices and mixed numbers.
EXACT_MATCH_DIFFERS = {
    ("50", "50\\%"),
    ("50\\%", "50"),
    ("(1,2)\\cup(3,4)", "(3,4)\\cup(1,2)"),
    ("1,2", "2,1"),
    ("1,2", "1,3"),
    ("\\begin{pmatrix} 1 \\\\ 2 \\end{pmatrix}", "\\begin{pmatrix}1\\\\2\\end{pmatrix}"),
    ("\\{1,2,3\\}", "\\{3,2,1\\}"),
    ("11\\frac{1}{2}", "\\frac{23}{2}"),
    ("0", "\\frac{0}{0}"),
}
# Outputs whose flexible grade differs from the harness's `math_verify`, which reads the whole text
# (the first of several boxes, parts of unclosed boxes) and does not normalize units or percentages.
MATH_VERIFY_DIFFERS = {
    ("5", "5 dollars"),
    ("50\\%", "50"),
    ("2", "2"),
    ("\\frac{1}{2}", "2"),
    ("50\\%", "0.5"),
    ("0.5", "\\frac12"),
    ("\\dfrac{2}{4}", "50\\%"),
    ("50\\%", "\\dfrac{2}{4}"),
}


@pytest.mark.parametrize(
    ("name", "data"), [("gsm8k", "gsm8k_test.jsonl"), ("math", "math_test.jsonl")]
)
def test_prompts_equal_the_harness(name, data):
    task = find_task(name, data=HERE / data, development=0)
    problems = task.problems("test")
    assert [plain_prompt(task, problem) for problem in problems] == PROMPTS[name]
    # A problem's examples do not depend on the part of the split that is scored.
    split_task = find_task(name, data=HERE / data, development=2)
    assert [
        plain_prompt(split_task, problem) for problem in split_task.problems("test")
    ] == PROMPTS[name][2:]


def test_chat_has_examples_as_messages():
    task = find_task("gsm8k", data=HERE / "gsm8k_test.jsonl", shots=2)
    problem = task.problems("test")[0]
    messages = chat_messages(task, problem)
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2 + ["user"]
    contents = [message["content"] for message in messages]
    delimiters = [" ", "\n\n"] * 2 + [""]
    joined = "".join(a + b for a, b in zip(contents, delimiters, strict=True))
    assert joined == plain_prompt(task, problem)


def test_gsm8k_extraction_and_grades_equal_the_harness():
    task = find_task("gsm8k")
    assert len(GRADES["gsm8k"]) >= 250
    for row in GRADES["gsm8k"]:
        answer = row["answer"].rsplit("#### ", 1)[-1]
        outcome = grade_output(task, problem_of(answer), row["output"])
        strict, flexible = row["filters"]["strict-match"], row["filters"]["flexible-extract"]
        assert (outcome.strict_answer or "[invalid]") == strict["text"], row
        assert (outcome.flexible_answer or "[invalid]") == flexible["text"], row
        assert (outcome.strict, outcome.flexible) == (
            bool(strict["exact_match"]),
            bool(flexible["exact_match"]),
        ), row


@pytest.mark.slow
def test_math_grades_equal_the_harness_except_where_listed(quick_grading):
    task = find_task("math")
    assert len(GRADES["math"]) >= 250
    exact, verified = set(), set()
    for row in GRADES["math"]:
        outcome = grade_output(task, problem_of(row["answer"]), row["output"])
        theirs = row["filters"]["none"]
        if outcome.strict != bool(theirs["exact_match"]):
            exact.add((row["answer"], outcome.strict_answer))
        if outcome.flexible != bool(theirs["math_verify"]):
            verified.add((row["answer"], outcome.flexible_answer))
    assert exact == EXACT_MATCH_DIFFERS
    assert verified == MATH_VERIFY_DIFFERS


def problem_of(answer):
    return Problem(id="1", kind="", question="", answer=answer)
