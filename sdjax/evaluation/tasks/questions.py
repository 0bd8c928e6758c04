"""Task of question-answer pairs from a JSONL file."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import ClassVar

from sdjax.evaluation import extraction
from sdjax.evaluation.data import DataRow, HubDataset
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.data_task import DataTask

_ANSWER_IS = re.compile(r"(?:answer is|answer:)\s*(.+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Questions(DataTask):
    """Task from JSON objects with `question`, `answer` and, optionally, `kind`, one per line.

    If every answer contains a number, numbers are compared: the strict metric reads the number
    after `####`, or the entire output if it is a number; the flexible metric reads the last number.
    Otherwise strings are compared, ignoring case: the strict metric reads the text after `####`, or
    the entire output; the flexible metric reads the text after the last "answer is", or the last
    line.
    """

    hub: ClassVar[HubDataset | None] = None
    fields: ClassVar[tuple[str, ...]] = ("question", "answer")

    name: str = "questions"

    def problem(self, row: DataRow, id: str) -> Problem:
        """Convert a row to a problem."""
        return Problem(
            id=id,
            kind=str(row.values.get("kind", "all")),
            question=row.text("question"),
            answer=row.text("answer"),
        )

    def prompt(self, problem: Problem) -> str:
        """Return the prompt of a problem."""
        return f"{problem.question}\nA:"

    def extract_strict(self, text: str) -> str | None:
        """Return the answer if the output has the requested format."""
        if not self._numeric:
            return (text.rsplit("#### ", 1)[-1].strip()) or None
        answer = extraction.strict_match(text)
        if answer is None and extraction.parse_number(text) is not None:
            answer = text.strip()
        return answer

    def extract_flexible(self, text: str) -> str | None:
        """Return the last text that looks like an answer."""
        if self._numeric:
            return extraction.flexible_extract(text)
        candidates = _ANSWER_IS.findall(text) or text.strip().splitlines()
        return candidates[-1].strip() if candidates else None

    def grade(self, extracted: str, problem: Problem) -> bool:
        """Return whether the answer is correct."""
        if self._numeric:
            number = extraction.parse_number(extracted)
            return number is not None and number == _number_in(problem.answer)
        return _normalize_text(extracted) == _normalize_text(problem.answer)

    @cached_property
    def _numeric(self) -> bool:
        return all(_number_in(problem.answer) is not None for problem in self._test_rows)


def _number_in(answer: str) -> Decimal | None:
    number = extraction.flexible_extract(answer)
    return None if number is None else extraction.parse_number(number)


def _normalize_text(text: str) -> str:
    return text.strip().strip(".!\"'").casefold()
