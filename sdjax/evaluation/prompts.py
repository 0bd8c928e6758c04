"""Prompts of problems: worked examples followed by the problem.

Both formats match lm-evaluation-harness. In plain text, an example is its prompt, a space and its
solution, and examples are separated by an empty line. In a chat (the harness's
`--apply_chat_template`), every prompt is a user message and every solution an assistant message.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from sdjax.core.errors import UserError
from sdjax.evaluation.task import BrokenTaskError, Problem, Task, call_checked, grade_output
from sdjax.io.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptedProblem:
    """A problem with its prompt.

    Attributes:
        problem: the problem.
        text: the prompt as text.
        tokens: the prompt as token ids, with the beginning-of-sequence token if the model has one.
    """

    problem: Problem
    text: str
    tokens: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Hexadecimal hash of the text."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def build_prompts(
    task: Task, problems: Iterable[Problem], tokenizer: Tokenizer, *, chat: bool = False
) -> list[PromptedProblem]:
    """Build the prompt of every problem.

    Args:
        task: formats problems and examples.
        problems: problems of the task.
        tokenizer: the model's tokenizer.
        chat: use the tokenizer's chat template.

    Raises:
        UserError: the tokenizer has no chat template, examples are missing, or the task fails to
            format a problem or to grade the first one's own answer.
    """
    prompted: list[PromptedProblem] = []
    for problem in problems:
        try:
            text = (
                tokenizer.render_chat(chat_messages(task, problem))
                if chat
                else plain_prompt(task, problem)
            )
        except BrokenTaskError as error:
            raise UserError(f"{error} (problem {problem.id})") from error
        if not prompted and (failure := grade_output(task, problem, _solution(problem)).failure):
            raise UserError(f"{failure} (grading the correct answer of problem {problem.id})")
        # A chat template contains the beginning-of-sequence token itself.
        tokens = tuple(tokenizer.encode(text, add_special=not chat))
        prompted.append(PromptedProblem(problem=problem, text=text, tokens=tokens))
    return prompted


def plain_prompt(task: Task, problem: Problem) -> str:
    """Return the prompt as text to complete."""
    examples = [
        f"{_prompt(task, example)} {_solution(example)}\n\n" for example in _examples(task, problem)
    ]
    return "".join([*examples, _prompt(task, problem)])


def chat_messages(task: Task, problem: Problem) -> list[dict[str, str]]:
    """Return the prompt as chat messages, ending with a user message."""
    messages = []
    for example in _examples(task, problem):
        messages.append({"role": "user", "content": _prompt(task, example)})
        messages.append({"role": "assistant", "content": _solution(example)})
    return [*messages, {"role": "user", "content": _prompt(task, problem)}]


def _prompt(task: Task, problem: Problem) -> str:
    return call_checked(task, "prompt", (str,), problem)


def _examples(task: Task, problem: Problem) -> Sequence[Problem]:
    return call_checked(task, "examples", (list, tuple), problem)


def _solution(example: Problem) -> str:
    return example.solution or example.answer
