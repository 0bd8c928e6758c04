"""From a problem to the tokens that a model is given: worked examples, then the problem.

Both forms are lm-evaluation-harness's: as a text, an example is its prompt, a space and its
solution, and examples are an empty line apart; as a conversation (its `--apply_chat_template`),
every prompt is a user's message and every solution the model's.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass

from sdjax.evaluation.task import Problem, Task
from sdjax.io.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class Prompted:
    """A problem as it is put to a model. `tokens` have the start token where the model has one."""

    problem: Problem
    text: str
    tokens: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def put(
    task: Task, problems: Iterable[Problem], tokenizer: Tokenizer, *, chat: bool = False
) -> list[Prompted]:
    """Every problem with its prompt, plain or by the tokenizer's chat template.

    Raises:
        UserError: `chat` with a tokenizer that has no chat template, or a task without examples
            that is to show some.
    """
    found = []
    for problem in problems:
        text = tokenizer.render_chat(messages(task, problem)) if chat else plain(task, problem)
        # A chat template writes the start token itself.
        tokens = tuple(tokenizer.encode(text, add_special=not chat))
        found.append(Prompted(problem=problem, text=text, tokens=tokens))
    return found


def plain(task: Task, problem: Problem) -> str:
    """The prompt as a text to be completed."""
    shown = [f"{task.prompt(one)} {_solution(one)}\n\n" for one in task.examples(problem)]
    return "".join([*shown, task.prompt(problem)])


def messages(task: Task, problem: Problem) -> list[dict[str, str]]:
    """The prompt as a conversation that ends with the user's message."""
    turns = []
    for example in task.examples(problem):
        turns.append({"role": "user", "content": task.prompt(example)})
        turns.append({"role": "assistant", "content": _solution(example)})
    return [*turns, {"role": "user", "content": task.prompt(problem)}]


def _solution(example: Problem) -> str:
    return example.solution or example.answer
