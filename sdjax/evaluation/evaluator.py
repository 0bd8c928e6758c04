"""Batched decoding and grading of a task's problems."""

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
from sdjax.models.types import Params
from sdjax.sharding.multihost import broadcast_from_main, is_main_process

# Number of threads that grade during decoding, and of outputs that may be queued for them.
_GRADING_THREADS = 2
_MAX_PENDING = 4


def evaluate_problems(
    decoder: Decoder,
    tokenizer: Tokenizer,
    params: Params,
    task: Task,
    problems: Sequence[PromptedProblem],
    *,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Decode greedily and grade every problem with both metrics.

    A prompt that is too long for the decoder yields an outcome with a `failure`. With several
    processes, only the main process grades, because a grade can depend on a timeout.

    Args:
        decoder: the model's decoder.
        tokenizer: the model's tokenizer.
        params: weights of the model.
        task: grades the outputs.
        problems: problems with their prompts.
        on_outcome: called with each outcome as it becomes available, in the same order on every
            process.

    Returns:
        the outcomes in the order of the problems.
    """
    outcomes: dict[int, Outcome] = {}
    pending: deque[tuple[int, Future[Outcome] | None]] = deque()

    def collect() -> None:
        index, future = pending.popleft()

        def serialize() -> bytes:
            assert future is not None  # called on the main process only
            return json.dumps(asdict(future.result())).encode()

        outcomes[index] = Outcome(**json.loads(broadcast_from_main(serialize)))
        if on_outcome is not None:
            on_outcome(outcomes[index])

    with ThreadPoolExecutor(_GRADING_THREADS) as threads:

        def submit(index: int, completion: Completion) -> None:
            future = None
            if is_main_process():
                text = completion.text
                if text is None:
                    text = tokenizer.decode(completion.tokens)
                problem = problems[index].problem
                future = threads.submit(_grade, task, problem, text, completion.failure)
            pending.append((index, future))
            if len(pending) > _MAX_PENDING:
                collect()

        prompts = [problem.tokens for problem in problems]
        # Stop strings cost periodic decoding to text, so none are passed if the task has none.
        stop = StopStrings(strings=task.stop, decode=tokenizer.decode) if task.stop else None
        decoder.decode(params, None, prompts, stop_strings=stop, on_completion=submit)
        while pending:
            collect()
    return [outcomes[index] for index in range(len(problems))]


def _grade(task: Task, problem: Problem, text: str, failure: str | None) -> Outcome:
    if failure is None:
        return grade_output(task, problem, text)
    return Outcome(problem_id=problem.id, output="", strict=False, flexible=False, failure=failure)
