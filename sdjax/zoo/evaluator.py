"""Evaluation of the zoo's models on the arithmetic task."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.prompts import build_prompts
from sdjax.evaluation.task import Outcome, Problem
from sdjax.evaluation.tasks.arithmetic import KINDS, ArithmeticTask
from sdjax.io.tokenizer import Tokenizer
from sdjax.models.config import ModelConfig
from sdjax.models.types import Params

DECODER = DecoderConfig(slots=160, prefill_batch=160, buckets=(9, 14, 30), max_new_tokens=10)


class Evaluator:
    """Evaluator of zoo models on one split of the arithmetic task, with greedy decoding."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, *, split: str) -> None:
        self._tokenizer = tokenizer
        self._task = ArithmeticTask()
        self.problems: list[Problem] = self._task.problems(split)
        self._prompted = build_prompts(self._task, self.problems, tokenizer)
        self._decoder = Decoder(config, DECODER, compute_dtype=jnp.float32)

    def outcomes(self, params: Params) -> list[Outcome]:
        """Evaluate a model and return the outcomes in the order of `problems`."""
        return evaluate_problems(self._decoder, self._tokenizer, params, self._task, self._prompted)

    def accuracies(self, params: Params) -> dict[str, float]:
        """Return the strict accuracy of each kind and, as "all", of all problems."""
        strict = np.array([outcome.strict for outcome in self.outcomes(params)])
        kinds = np.array([problem.kind for problem in self.problems])
        return {kind: float(strict[kinds == kind].mean()) for kind in KINDS} | {
            "all": float(strict.mean())
        }
