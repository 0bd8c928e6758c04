"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): grade-school word problems.

Prompts and grades match the task `gsm8k` of lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdjax.evaluation import extraction
from sdjax.evaluation.data import DataRow, HubDataset
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.data_task import DataTask


@dataclass(frozen=True, kw_only=True)
class GSM8K(DataTask):
    """GSM8K with the harness's prompt, filters and `exact_match`.

    If the user's data has no train split, the worked examples are the first `shots` of the
    harness's eight examples for `gsm8k_cot` (Wei et al. 2022), in the format of this task.
    """

    hub: ClassVar[HubDataset] = HubDataset(path="openai/gsm8k", configs=("main",))
    fixed: ClassVar[str] = "gsm8k_cot"
    fields: ClassVar[tuple[str, ...]] = ("question", "answer")

    name: str = "gsm8k"
    stop: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
    shots: int = 5

    def problem(self, row: DataRow, id: str) -> Problem:
        """Convert a row to a problem."""
        solution = row.text("answer")
        return Problem(
            id=id,
            kind="gsm8k",
            question=row.text("question"),
            answer=solution.rsplit("#### ", 1)[-1],
            solution=solution,
        )

    def prompt(self, problem: Problem) -> str:
        """Return the prompt of a problem."""
        return f"Question: {problem.question}\nAnswer:"

    def extract_strict(self, text: str) -> str | None:
        """Return the answer if the output has the requested format."""
        return extraction.strict_match(text)

    def extract_flexible(self, text: str) -> str | None:
        """Return the last text that looks like an answer."""
        return extraction.flexible_extract(text)

    def grade(self, extracted: str, problem: Problem) -> bool:
        """Return whether the answer is correct."""
        return extraction.normalize_number(extracted) == extraction.normalize_number(problem.answer)
