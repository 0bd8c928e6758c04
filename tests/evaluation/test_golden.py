"""Expected grades of answers and outputs, including adversarial ones (golden.jsonl)."""

import json
from collections import Counter
from pathlib import Path

import pytest

from sdjax.evaluation.task import Problem, grade_output
from sdjax.evaluation.tasks.registry import find_task

ROWS = [
    json.loads(line)
    for line in Path(__file__).with_name("golden.jsonl").read_text(encoding="utf-8").splitlines()
]


def test_every_task_has_enough_cases():
    counts = Counter(row["task"] for row in ROWS)
    assert sum(counts.values()) >= 150
    assert counts.keys() == {"gsm8k", "svamp", "math", "arithmetic"}


@pytest.mark.parametrize("name", ["gsm8k", "svamp", "math", "arithmetic"])
def test_golden(name, quick_grading, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where a hostile answer might leave a file
    data = tmp_path / "numbers.jsonl"
    data.write_text('{"Body": "Two.", "Question": "How many?", "Answer": 2}\n')
    task = find_task(name, data=data if name == "svamp" else None)
    mismatches = []
    for row in ROWS:
        if row["task"] == name:
            problem = Problem(id="1", kind="", question="", answer=row["answer"])
            outcome = grade_output(task, problem, row["output"])
            if (outcome.strict, outcome.flexible) != (row["strict"], row["flexible"]):
                mismatches.append((row, outcome))
    assert not mismatches
    assert [path.name for path in tmp_path.iterdir()] == [data.name]
    assert not Path("/tmp/golden").exists()
