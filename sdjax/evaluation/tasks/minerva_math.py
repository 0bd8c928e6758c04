"""MATH (Hendrycks et al. 2021, arXiv 2103.03874) with the prompt of Minerva (Lewkowycz et al.
2022), as the lm-evaluation-harness's `minerva_math` (0.4.13) poses it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from sdjax.core.errors import UserError
from sdjax.evaluation import extraction
from sdjax.evaluation.data import Hub, Row
from sdjax.evaluation.grader import shared_grader
from sdjax.evaluation.latex import normalise
from sdjax.evaluation.task import Problem
from sdjax.evaluation.tasks.data_task import DataTask
from sdjax.evaluation.tasks.fixed import fixed_examples

_DOLLAR = re.compile(r"(?<!\\)\$")  # of a formula, not of money


@dataclass(frozen=True, kw_only=True)
class MinervaMath(DataTask):
    r"""The harness's four examples; answers are equal where they are after the usual normalisation,
    or where math-verify says so in a confined worker.

    `strict` reads naively, as the harness's `exact_match` does: the sentence with which every
    example ends. `flexible` reads the last `\boxed{…}`, where there is none that sentence, then the
    last formula between dollar signs, then the last number.

    Attributes:
        allow_missing: layers of the workers' confinement that this machine may lack.
    """

    hub: ClassVar[Hub] = Hub(
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

    def problem(self, row: Row, id: str) -> Problem:
        solution = row.text("solution")
        answer = extraction.last_boxed(solution)
        if answer is None and "answer" in row.values:
            answer = row.text("answer")
        if answer is None:
            raise UserError(rf"{row.where}: the solution has no \boxed{{}}, and there is no answer")
        kind = row.values.get("subject") or row.values.get("type") or "math"
        question = row.text("problem")
        return Problem(id=id, kind=str(kind), question=question, answer=answer, solution=solution)

    def prompt(self, problem: Problem) -> str:
        return f"Problem:\n{problem.question}\n\nSolution:"

    def examples(self, problem: Problem) -> Sequence[Problem]:
        return fixed_examples("minerva_math", self.shots)

    def extract_strict(self, text: str) -> str | None:
        sentence = extraction.final_answer_sentence(text)
        formula = re.fullmatch(r"\$([^$]+)\$", sentence or "")
        return formula[1].strip() if formula else sentence

    def extract_flexible(self, text: str) -> str | None:
        for read in (
            extraction.last_boxed,
            self.extract_strict,
            extraction.last_formula,
            extraction.last_number,
        ):
            if (found := read(text)) is not None:
                return found
        return None

    def grade(self, extracted: str, problem: Problem) -> bool:
        given, expected = normalise(extracted), normalise(problem.answer)
        if given == expected:
            return True
        if not given:
            return False
        gold, answer = (_DOLLAR.sub("", text) for text in (problem.answer, extracted))
        return shared_grader(self.allow_missing).same(gold, answer)
