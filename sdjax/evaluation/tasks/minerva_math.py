"""MATH (Hendrycks et al. 2021, arXiv 2103.03874) with Minerva's prompt (Lewkowycz et al. 2022).

Prompts match the task `minerva_math` of lm-evaluation-harness 0.4.13.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sdjax.core.errors import UserError
from sdjax.evaluation import extraction
from sdjax.evaluation.data import DataRow, HubDataset
from sdjax.evaluation.grader import shared_grader
from sdjax.evaluation.latex import normalize_latex
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.data_task import DataTask
from sdjax.evaluation.tasks.fixed import fixed_examples

_DOLLAR = re.compile(r"(?<!\\)\$")  # delimits a formula; \$ is money


@dataclass(frozen=True, kw_only=True)
class MinervaMath(DataTask):
    r"""MATH with the harness's four worked examples.

    Two answers are equal if their normal forms are equal, or if math-verify in a confined worker
    considers them equal. The strict metric reads the sentence that ends every example, like the
    harness's `exact_match`. The flexible metric reads the last `\boxed{…}`; without one, that
    sentence, then the last formula between dollar signs, then the last number.

    Attributes:
        allow_missing: layers of confinement that the workers may run without.
    """

    hub: ClassVar[HubDataset] = HubDataset(
        path="EleutherAI/hendrycks_math",
        configs=(
            *("algebra", "counting_and_probability", "geometry", "intermediate_algebra"),
            *("number_theory", "prealgebra", "precalculus"),
        ),
    )
    fields: ClassVar[tuple[str, ...]] = ("problem", "solution")

    name: str = "math"
    stop: tuple[str, ...] = ("Problem:",)
    shots: int = 4
    allow_missing: tuple[str, ...] = ()

    def problem(self, row: DataRow, id: str) -> Problem:
        """Convert a row to a problem."""
        solution = row.text("solution")
        answer = extraction.last_boxed(solution)
        if answer is None and "answer" in row.values:
            answer = row.text("answer")
        if answer is None:
            raise UserError(
                rf"{row.where}: no \boxed{{}} in the solution; add one, or add a field answer"
            )
        kind = row.values.get("subject") or row.values.get("type") or "math"
        question = row.text("problem")
        return Problem(id=id, kind=str(kind), question=question, answer=answer, solution=solution)

    def prompt(self, problem: Problem) -> str:
        """Return the prompt of a problem."""
        return f"Problem:\n{problem.question}\n\nSolution:"

    def examples(self, problem: Problem) -> Sequence[Problem]:
        """Return the worked examples."""
        return fixed_examples("minerva_math", self.shots)

    def extract_strict(self, text: str) -> str | None:
        """Return the answer if the output has the requested format."""
        sentence = extraction.final_answer_sentence(text)
        formula = re.fullmatch(r"\$([^$]+)\$", sentence or "")
        return formula[1].strip() if formula else sentence

    def extract_flexible(self, text: str) -> str | None:
        """Return the last text that looks like an answer."""
        for extract in (
            extraction.last_boxed,
            self.extract_strict,
            extraction.last_formula,
            extraction.flexible_extract,
        ):
            if (answer := extract(text)) is not None:
                return answer
        return None

    def grade(self, extracted: str, problem: Problem) -> bool:
        """Return whether the answer is correct."""
        normalized = normalize_latex(extracted)
        if normalized == normalize_latex(problem.answer):
            return True
        if not normalized:
            return False
        gold, answer = (_DOLLAR.sub("", text) for text in (problem.answer, extracted))
        return shared_grader(self.allow_missing).same(gold, answer)
