"""A model's outcomes on problems: batched decoding, extraction, grades."""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict

from sdjax.decoding.decoder import Completion, Decoder
from sdjax.evaluation.prompts import Prompted
from sdjax.evaluation.task import Outcome, Task, grade_output
from sdjax.io.tokenizer import Tokenizer
from sdjax.sharding.distributed import is_main_process
from sdjax.sharding.together import from_main

# Outputs that are graded beside decoding; more of them wait for the oldest.
_GRADED_AT_ONCE = 2
_WAITING = 4


def evaluate(
    decoder: Decoder,
    tokenizer: Tokenizer,
    params: dict,
    task: Task,
    problems: Sequence[Prompted],
    *,
    on_outcome: Callable[[Outcome], None] | None = None,
) -> list[Outcome]:
    """Greedy answers to all problems, graded strictly and flexibly; in the problems' order.

    A prompt that is empty or longer than the decoder takes is an outcome with a `failure`, and the
    rest goes on. `on_outcome` is called as outcomes become known, in the same order on every
    process: the main process grades for all of them, since a grade may depend on its clock.
    """
    outcomes: dict[int, Outcome] = {}
    grading: deque[tuple[int, Future[Outcome] | None]] = deque()

    def know(index: int, outcome: Outcome) -> None:
        outcomes[index] = outcome
        if on_outcome is not None:
            on_outcome(outcome)

    def collect() -> None:
        index, future = grading.popleft()

        def graded() -> bytes:
            assert future is not None  # on the main process, which alone calls this
            return json.dumps(asdict(future.result())).encode()

        know(index, Outcome(**json.loads(from_main(graded))))

    fitting = []
    for index, one in enumerate(problems):
        failure = _misfit(decoder, one)
        if failure is None:
            fitting.append(index)
        else:
            know(index, _failed(one, failure))

    with ThreadPoolExecutor(_GRADED_AT_ONCE) as threads:

        def grade(place: int, completion: Completion) -> None:
            index = fitting[place]
            text = tokenizer.decode(completion.tokens)
            arguments = (task, problems[index].problem, text)
            future = threads.submit(grade_output, *arguments) if is_main_process() else None
            grading.append((index, future))
            if len(grading) > _WAITING:
                collect()

        prompts = [problems[index].tokens for index in fitting]
        if prompts:
            decoder.decode(params, None, prompts, on_finished=grade)
        while grading:
            collect()
    return [outcomes[index] for index in range(len(problems))]


def _misfit(decoder: Decoder, one: Prompted) -> str | None:
    """Why a prompt cannot be decoded, or None."""
    longest = decoder.settings.buckets[-1]
    if not one.tokens:
        return "the prompt is empty"
    if len(one.tokens) > longest:
        return f"the prompt has {len(one.tokens)} tokens, of which at most {longest} fit"
    return None


def _failed(one: Prompted, failure: str) -> Outcome:
    return Outcome(
        problem_id=one.problem.id, output="", strict=False, flexible=False, failure=failure
    )
