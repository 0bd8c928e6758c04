"""From a problem to the tokens that a model is given: worked examples, then the problem.

Both forms are lm-evaluation-harness's: as a text, an example is its prompt, a space and its
solution, and examples are an empty line apart; as a conversation (its `--apply_chat_template`),
every prompt is a user's message and every solution the model's.
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
    """A problem as it is put to a model. `tokens` have the start token where the model has one."""

    problem: Problem
    text: str
    tokens: tuple[int, ...]

    @property
    def sha256(self) -> str:
        """Of the text, in hexadecimal."""
        return hashlib.sha256(self.text.encode("utf-8", "surrogatepass")).hexdigest()


def build_prompts(
    task: Task, problems: Iterable[Problem], tokenizer: Tokenizer, *, chat: bool = False
) -> list[PromptedProblem]:
    """Every problem with its prompt, plain or by the tokenizer's chat template.

    Raises:
        UserError: `chat` with a tokenizer that has no chat template, a task without examples that
            is to show some, or one that fails to pose a problem or to grade the first one's answer.
    """
    found: list[PromptedProblem] = []
    for problem in problems:
        try:
            text = tokenizer.render_chat(messages(task, problem)) if chat else plain(task, problem)
        except BrokenTaskError as error:
            raise UserError(f"{error} (problem {problem.id})") from error
        if not found and (failure := grade_output(task, problem, _solution(problem)).failure):
            raise UserError(f"{failure} (problem {problem.id}, given its own answer)")
        # A chat template writes the start token itself.
        tokens = tuple(tokenizer.encode(text, add_special=not chat))
        found.append(PromptedProblem(problem=problem, text=text, tokens=tokens))
    return found


def plain(task: Task, problem: Problem) -> str:
    """The prompt as a text to be completed."""
    shown = [f"{_prompt(task, one)} {_solution(one)}\n\n" for one in _examples(task, problem)]
    return "".join([*shown, _prompt(task, problem)])


def messages(task: Task, problem: Problem) -> list[dict[str, str]]:
    """The prompt as a conversation that ends with the user's message."""
    turns = []
    for example in _examples(task, problem):
        turns.append({"role": "user", "content": _prompt(task, example)})
        turns.append({"role": "assistant", "content": _solution(example)})
    return [*turns, {"role": "user", "content": _prompt(task, problem)}]


def _prompt(task: Task, problem: Problem) -> str:
    return call_checked(task, "prompt", (str,), problem)


def _examples(task: Task, problem: Problem) -> Sequence[Problem]:
    return call_checked(task, "examples", (list, tuple), problem)


def _solution(example: Problem) -> str:
    return example.solution or example.answer
