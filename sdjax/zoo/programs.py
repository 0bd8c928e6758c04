"""Merge programs that the zoo's seed is trained on, as answers to prompts with and without memory.

Half of the answers are programs of the grammar. The others are children of one or two programs in
the prompt. No program is scored for that: scores are drawn at random. A child is made from the
program with the better score (all operations but `explore`), so that a seed whose prompt holds
programs with true scores continues from the best of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from sdjax.io.tokenizer import Tokenizer
from sdjax.programs.grammar import sample_candidate, sample_draft
from sdjax.programs.grammar_children import sample_child
from sdjax.programs.grammar_draft import Draft
from sdjax.programs.memory_prompts import EarlierProgram, PromptMemory
from sdjax.programs.prompts import PromptTemplate, find_prompt
from sdjax.training.packing import Example

SLOTS = ("expert_1", "expert_2", "expert_3")
PROMPT = "short-memory"  # without programs, the same text as `short`
MAX_TARGET = 118  # tokens of a program with the end of sequence; `max_new_tokens` of the demo
_OPERATIONS = {"improve": 0.4, "combine": 0.3, "simplify": 0.1, "explore": 0.2}


@dataclass(frozen=True, kw_only=True)
class ProgramText:
    """A program that the seed is trained on.

    Attributes:
        memory: what its prompt shows.
        source: its source code.
    """

    memory: PromptMemory
    source: str

    @property
    def prompt(self) -> str:
        """The prompt; without a trailing newline, see `programs.prompts`."""
        return _prompt().render(slots=SLOTS, descriptions={}, memory=self.memory)


@cache
def _prompt() -> PromptTemplate:
    return find_prompt(PROMPT)


def program_texts(count: int, seed: int, memory: float = 0.5) -> list[ProgramText]:
    """Return distinct training programs.

    Args:
        count: number of programs.
        seed: seed of the random generator.
        memory: share of prompts that show earlier programs.
    """
    rng = np.random.default_rng(seed)
    texts: dict[str, ProgramText] = {}
    while len(texts) < count:
        if int((len(texts) + 1) * memory) > int(len(texts) * memory):
            text = _child_text(rng)
        else:
            text = ProgramText(memory=PromptMemory(), source=sample_candidate(rng).text)
        texts.setdefault(text.source, text)
    return list(texts.values())


def _child_text(rng: np.random.Generator) -> ProgramText:
    """Return a child of random programs, with a prompt that shows them."""
    names, shares = list(_OPERATIONS), list(_OPERATIONS.values())
    while True:
        operation = names[int(rng.choice(len(names), p=shares))]
        count = 2 if operation == "combine" or rng.random() < 0.6 else 1
        parents = _parents(rng, count)
        child = sample_child(rng, operation, parents)
        if child is not None:
            break
    scores = _scores(rng, count)
    programs = tuple(
        EarlierProgram(source=parent.text(), score=score)
        for parent, score in zip(parents, scores, strict=True)
    )
    return ProgramText(
        memory=PromptMemory(programs=programs, operation=operation), source=child.text()
    )


def _parents(rng: np.random.Generator, count: int) -> list[Draft]:
    """Return different random programs; often one of them is a child of the other, as in a run."""
    first = sample_draft(rng)
    if rng.random() < 0.3:
        first = sample_child(rng, "improve", [first]) or first
    if count == 1:
        return [first]
    related = sample_child(rng, "improve", [first]) if rng.random() < 0.35 else None
    while related is None or related.text() == first.text():
        related = sample_draft(rng)
    return [first, related] if rng.random() < 0.5 else [related, first]


def _scores(rng: np.random.Generator, count: int) -> list[float]:
    """Return plausible scores in percent, in ascending order."""
    best = float(np.clip(rng.normal(70, 14), 12, 98))
    lower = best - rng.exponential(8, size=count - 1)
    return sorted([*(max(float(score), 3.0) for score in lower), best])


def program_example(tokenizer: Tokenizer, text: ProgramText) -> Example:
    """Return a training program as the target of its prompt, with the end-of-sequence token.

    The program starts with the newline that the prompt lacks, because a newline and the following
    indentation may be a single token.
    """
    target = tokenizer.encode("\n" + text.source.strip("\n"), add_special=False)
    return Example(
        prompt=tuple(tokenizer.encode(text.prompt, add_special=False)),
        target=(*target, tokenizer.eos_ids[0]),
    )


def tokenizer_texts(texts: Sequence[ProgramText]) -> Iterator[str]:
    """Yield the texts that the tokenizer is trained on: all programs, and some of the prompts."""
    yield from (text.source for text in texts)
    yield from (text.prompt for text in texts[: len(texts) // 10])
