"""SVAMP (Patel et al. 2021, arXiv 2103.07191): misleading one-step word problems."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdjax.evaluation.data import DataRow, HubDataset
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.questions import Questions


@dataclass(frozen=True, kw_only=True)
class SVAMP(Questions):
    """SVAMP with GSM8K's prompt; the kind of a problem is its `Type` in the data."""

    hub: ClassVar[HubDataset] = HubDataset(path="ChilleD/SVAMP", configs=("default",))
    fields: ClassVar[tuple[str, ...]] = ("Body", "Question", "Answer")

    name: str = "svamp"
    stop: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
    max_new_tokens: int = 128

    def problem(self, row: DataRow, id: str) -> Problem:
        """Convert a row to a problem."""
        kind = row.values.get("Type") or "svamp"
        question = f"{row.text('Body').strip()} {row.text('Question').strip()}"
        return Problem(id=id, kind=str(kind), question=question, answer=row.text("Answer"))

    def prompt(self, problem: Problem) -> str:
        """Return the prompt of a problem."""
        return f"Question: {problem.question}\nAnswer:"
