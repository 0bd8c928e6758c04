"""A model's outcomes on problems: batched decoding, extraction, grades."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from sdjax.decoding.decoder import Completion, Decoder
from sdjax.decoding.stopping import StopStrings
from sdjax.evaluation.prompts import PromptedProblem
from sdjax.evaluation.task import Outcome, Problem, Task, grade_output
from sdjax.io.tokenizer import Tokenizer
from sdjax.sharding.multihost import broadcast_from_main, is_main_process

# Outputs that are graded beside decoding; more of them wait for the oldest.
_GRADED_AT_ONCE = 2
_WAITING = 4


def evaluate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    params: dict,
    task: Task,
    problems: Sequence[PromptedProblem],
    *,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Greedy answers to all problems, graded strictly and flexibly; in the problems' order.

    A prompt that the decoder cannot take is an outcome with a `failure`, and the rest goes on.
    `on_outcome` is called as outcomes become known, in the same order on every process: the main
    process grades for all of them, since a grade may depend on its clock.
    """
    outcomes: dict[int, Outcome] = {}
    grading: deque[tuple[int, Future[Outcome] | None]] = deque()

    def collect() -> None:
        index, future = grading.popleft()

        def graded() -> bytes:
            assert future is not None  # on the main process, which alone calls this
            return json.dumps(asdict(future.result())).encode()

        outcomes[index] = Outcome(**json.loads(broadcast_from_main(graded)))
        if on_outcome is not None:
            on_outcome(outcomes[index])

    with ThreadPoolExecutor(_GRADED_AT_ONCE) as threads:

        def grade(index: int, completion: Completion) -> None:
            future = None
            if is_main_process():
                text = completion.text
                if text is None:
                    text = tokenizer.decode(completion.tokens)
                problem = problems[index].problem
                future = threads.submit(_outcome, task, problem, text, completion.failure)
            grading.append((index, future))
            if len(grading) > _WAITING:
                collect()

        prompts = [one.tokens for one in problems]
        # Strings cost a look at the texts now and then: none where the task has none.
        strings = StopStrings(strings=task.stop, decode=tokenizer.decode) if task.stop else None
        decoder.decode(params, None, prompts, stop_strings=strings, on_completion=grade)
        while grading:
            collect()
    return [outcomes[index] for index in range(len(problems))]


def _outcome(task: Task, problem: Problem, text: str, failure: str | None) -> Outcome:
    if failure is None:
        return grade_output(task, problem, text)
    return Outcome(problem_id=problem.id, output="", strict=False, flexible=False, failure=failure)
