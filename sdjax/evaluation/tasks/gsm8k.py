"""GSM8K (Cobbe et al. 2021, arXiv 2110.14168): word problems of grade school, as the
lm-evaluation-harness's task `gsm8k` (0.4.13) poses and grades them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from sdjax.evaluation import extraction
from sdjax.evaluation.data import Hub, Row
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.data_task import DataTask


@dataclass(frozen=True, kw_only=True)
class GSM8K(DataTask):
    """The harness's prompt, `strict-match`, `flexible-extract` and `exact_match`.

    Where a user's data have no train split, the examples are the first `shots` of the eight that
    the harness has for `gsm8k_cot` (Wei et al. 2022), in this task's format.
    """

    hub: ClassVar[Hub] = Hub(path="openai/gsm8k", configs=("main",))
    fixed: ClassVar[str] = "gsm8k_cot"
    fields: ClassVar[tuple[str, ...]] = ("question", "answer")

    name: str = "gsm8k"
    stop: tuple[str, ...] = ("Question:", "</s>", "<|im_end|>")
    shots: int = 5

    def problem(self, row: Row, id: str) -> Problem:
        solution = row.text("answer")
        return Problem(
            id=id,
            kind="gsm8k",
            question=row.text("question"),
            answer=solution.rsplit("#### ", 1)[-1],
            solution=solution,
        )

    def prompt(self, problem: Problem) -> str:
        return f"Question: {problem.question}\nAnswer:"

    def extract_strict(self, text: str) -> str | None:
        return extraction.number_behind_hashes(text)

    def extract_flexible(self, text: str) -> str | None:
        return extraction.last_number(text)

    def grade(self, extracted: str, problem: Problem) -> bool:
        return extraction.comparable(extracted) == extraction.comparable(problem.answer)
