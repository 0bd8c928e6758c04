"""Tasks by name, and any JSONL file of questions and answers as a task."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from sdjax.errors import UserError
from sdjax.evaluation.arithmetic import ArithmeticTask
from sdjax.evaluation.task import Problem, Task
from sdjax.io.json_lines import read_json_lines

TASKS = {"arithmetic": ArithmeticTask}


@dataclasses.dataclass(frozen=True, kw_only=True)
class JsonlTask:
    """Problems of a file with one object a line: `question`, `answer`, and perhaps `kind`.

    The last number of an answer counts, as in GSM8K's `#### 42`. The first `development` lines
    are for development, the next `test` lines for the test.
    """

    path: Path
    development: int | None = None
    test: int | None = None

    @property
    def name(self) -> str:
        return str(self.path)

    def problems(self, split: str) -> list[Problem]:
        rows = _read_rows(self.path)
        middle = len(rows) // 2 if self.development is None else self.development
        if split == "development":
            return rows[:middle]
        return rows[middle:] if self.test is None else rows[middle : middle + self.test]

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question}\nA:"

    def extract_strict(self, text: str) -> str | None:
        """The number behind `####`, or the number that the whole answer is."""
        match = re.search(r"####\s*(-?[\d.,]*\d)", text) or re.fullmatch(
            r"\s*(-?[\d.,]*\d)\s*", text
        )
        return match[1].replace(",", "") if match else None

    def extract_flexible(self, text: str) -> str | None:
        """The last number in the text."""
        numbers = re.findall(r"-?(?:\d[\d,]*)(?:\.\d+)?", text)
        return numbers[-1].replace(",", "") if numbers else None

    def grade(self, extracted: str, problem: Problem) -> bool:
        expected = self.extract_flexible(problem.answer)
        try:
            return expected is not None and float(extracted) == float(expected)
        except ValueError:
            return False


def find_task(name: str, *, development: int | None = None, test: int | None = None) -> Task:
    """The task of a name, or of a JSONL file.

    Raises:
        UserError: neither a known task nor a file that can be read.
    """
    if name in TASKS:
        standard = TASKS[name]()
        return dataclasses.replace(
            standard,
            development=standard.development if development is None else development,
            test=standard.test if test is None else test,
        )
    path = Path(name).expanduser()
    if not path.is_file():
        raise UserError(
            f"task {name!r}: neither a task ({', '.join(TASKS)}) nor a .jsonl file that exists"
        )
    task = JsonlTask(path=path, development=development, test=test)
    if not task.problems("development") and not task.problems("test"):
        raise UserError(f"{path}: holds no problem; write one JSON object a line")
    return task


def _read_rows(path: Path) -> list[Problem]:
    return [
        Problem(
            id=f"line-{number}",
            kind=str(row.get("kind", path.stem)),
            question=str(row["question"]),
            answer=str(row["answer"]),
        )
        for number, row in read_json_lines(path, ("question", "answer"))
    ]
