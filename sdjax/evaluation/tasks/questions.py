"""Any JSONL file of questions and answers."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import Decimal
from functools import cached_property
from typing import ClassVar

from sdjax.evaluation import extraction
from sdjax.evaluation.data import Hub, Row
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.data_task import DataTask

_ANNOUNCED = re.compile(r"(?:answer is|answer:)\s*(.+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Questions(DataTask):
    """One object a line: `question`, `answer`, and perhaps `kind`.

    Where every answer holds a number, numbers are read and compared: strictly the one behind
    `####`, or that the whole output is; flexibly the last one. Otherwise texts, whatever their
    case: strictly what is behind `####`, or the whole output; flexibly what is behind the last
    "answer is", or the last line.
    """

    hub: ClassVar[Hub | None] = None
    fields: ClassVar[tuple[str, ...]] = ("question", "answer")

    name: str = "questions"

    def problem(self, row: Row, id: str) -> Problem:
        return Problem(
            id=id,
            kind=str(row.values.get("kind", "all")),
            question=row.text("question"),
            answer=row.text("answer"),
        )

    def prompt(self, problem: Problem) -> str:
        return f"{problem.question}\nA:"

    def extract_strict(self, text: str) -> str | None:
        if not self._numeric:
            return (text.rsplit("#### ", 1)[-1].strip()) or None
        found = extraction.number_behind_hashes(text)
        if found is None and extraction.as_number(text) is not None:
            found = text.strip()
        return found

    def extract_flexible(self, text: str) -> str | None:
        if self._numeric:
            return extraction.last_number(text)
        announced = _ANNOUNCED.findall(text)
        lines = announced or text.strip().splitlines()
        return lines[-1].strip() if lines else None

    def grade(self, extracted: str, problem: Problem) -> bool:
        if self._numeric:
            given = extraction.as_number(extracted)
            return given is not None and given == _number_in(problem.answer)
        return _plain(extracted) == _plain(problem.answer)

    @cached_property
    def _numeric(self) -> bool:
        return all(_number_in(problem.answer) is not None for problem in self._tested)


def _number_in(answer: str) -> Decimal | None:
    found = extraction.last_number(answer)
    return None if found is None else extraction.as_number(found)


def _plain(text: str) -> str:
    return text.strip().strip(".!\"'").casefold()
