"""SVAMP (Patel et al. 2021, arXiv 2103.07191): word problems of one step, varied to mislead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdjax.evaluation.data import Hub, Row
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.questions import Questions


@dataclass(frozen=True, kw_only=True)
class SVAMP(Questions):
    """Posed as GSM8K is; kinds are the data's `Type`."""

    hub: ClassVar[Hub] = Hub(path="ChilleD/SVAMP", configs=("default",))
    fields: ClassVar[tuple[str, ...]] = ("Body", "Question", "Answer")

    name: str = "svamp"
    stop: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
    max_new_tokens: int = 128

    def problem(self, row: Row, id: str) -> Problem:
        kind = row.values.get("Type") or "svamp"
        question = f"{row.text('Body').strip()} {row.text('Question').strip()}"
        return Problem(id=id, kind=str(kind), question=question, answer=row.text("Answer"))

    def prompt(self, problem: Problem) -> str:
        return f"Question: {problem.question}\nAnswer:"
