"""Decoded scores of candidates, and the two halves of the development problems."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from sdjax.core.errors import UserError
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.prompts import PromptedProblem
from sdjax.evaluation.task import Problem, Task
from sdjax.io.tokenizer import Tokenizer
from sdjax.merging.algorithm import Algorithm
from sdjax.merging.engine import Merger
from sdjax.merging.merged_model import MergedModel


def split_development(
    problems: Sequence[Problem], held_out: int | None = None
) -> tuple[list[Problem], list[Problem]]:
    """Return two disjoint parts of the development problems, each in the task's order.

    A search chooses by the first; the second, which it never sees, says what was gained. The parts
    depend only on the problems' ids and questions.

    Args:
        problems: the development problems.
        held_out: number of problems in the second part; by default half of them, rounded down.

    Raises:
        UserError: a part would be empty.
    """
    count = len(problems) // 2 if held_out is None else held_out
    if len(problems) < 2:
        raise UserError(
            f"tuning needs at least 2 development problems, not {len(problems)}: half of them to "
            "choose by, the other half to confirm the gain"
        )
    if not 0 < count < len(problems):
        raise UserError(
            f"{count} of {len(problems)} development problems cannot be held out: at least one "
            "must be left to choose by"
        )

    def digest(problem: Problem) -> bytes:
        text = f"{problem.id}\0{problem.question}"
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    first = {id(problem) for problem in sorted(problems, key=digest)[: len(problems) - count]}
    return (
        [problem for problem in problems if id(problem) in first],
        [problem for problem in problems if id(problem) not in first],
    )


class CandidateScorer:
    """Merges a candidate in memory and decodes its answers.

    Base and experts stay on the devices, and the buffers of each candidate are donated to the next
    one; nothing is written to disk.
    """

    def __init__(
        self,
        merger: Merger,
        bind: Callable[[np.ndarray], Algorithm],
        *,
        decoder: Decoder,
        tokenizer: Tokenizer,
        task: Task,
        metric: str,
        key: jax.Array,
    ) -> None:
        """Prepare the evaluations.

        Args:
            merger: merger of the base and the experts.
            bind: values [parameters] to the algorithm.
            decoder: decoder for the base's architecture.
            tokenizer: the base's tokenizer.
            task: grades the answers.
            metric: "strict" or "flexible", the accuracy that is the score.
            key: typed PRNG key of the merge, for random methods.
        """
        self._merger = merger
        self._bind = bind
        self._decoder = decoder
        self._tokenizer = tokenizer
        self._task = task
        self._metric = metric
        self._key = key
        self._last: MergedModel | None = None

    def __call__(self, values: np.ndarray, problems: Sequence[PromptedProblem]) -> dict[str, Any]:
        """Score a candidate.

        Args:
            values: the candidate's values [parameters].
            problems: the problems to answer.

        Returns:
            `score`, the accuracy; `strict` and `flexible`, a digit 0 or 1 per problem; `finite`,
            whether the merged weights are; if not, all answers count as wrong; `tokens`, the number
            of tokens that were read and generated.
        """
        algorithm = self._bind(values)
        self._last = merged = self._merger(algorithm, key=self._key, donate=self._last)
        if not merged.finite:
            wrong = "0" * len(problems)
            return {"score": 0.0, "strict": wrong, "flexible": wrong, "finite": False, "tokens": 0}
        outcomes = evaluate_problems(
            self._decoder, self._tokenizer, merged.params, self._task, problems
        )
        correct = [getattr(outcome, self._metric) for outcome in outcomes]
        stats = self._decoder.stats
        return {
            "score": sum(correct) / len(correct),
            "strict": "".join(str(int(outcome.strict)) for outcome in outcomes),
            "flexible": "".join(str(int(outcome.flexible)) for outcome in outcomes),
            "finite": True,
            "tokens": stats.prompt_tokens + stats.new_tokens,
        }
