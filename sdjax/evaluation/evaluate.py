"""A model's outcomes on problems: prompts, batched decoding, extraction, grades."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from sdjax.decoding.decoder import Completion, Decoder
from sdjax.evaluation.task import Outcome, Problem, Task, grade_output
from sdjax.io.tokenizer import Tokenizer


def evaluate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    params: dict,
    task: Task,
    problems: Sequence[Problem],
    *,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Greedy answers to all problems, graded strictly and flexibly; in the problems' order."""
    prompts = [tokenizer.encode(task.prompt(problem), add_special=True) for problem in problems]
    outcomes: dict[int, Outcome] = {}

    def grade(index: int, completion: Completion) -> None:
        text = tokenizer.decode(completion.tokens)
        outcomes[index] = grade_output(task, problems[index], text)
        if on_outcome is not None:
            on_outcome(outcomes[index])

    decoder.decode(params, None, prompts, on_finished=grade)
    return [outcomes[index] for index in range(len(problems))]
