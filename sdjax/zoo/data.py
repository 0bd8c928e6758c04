"""What the zoo's models are trained on: exercises and merge programs, as packed batches.

Axes: B rows, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np

from sdjax.evaluation.arithmetic import Exercise, exercises, prompt_of
from sdjax.io.tokenizer import Tokenizer
from sdjax.programs.grammar import sample_program
from sdjax.training.packing import Example, pack

SLOTS = ("expert_1", "expert_2", "expert_3")
# The prompt ends without a newline and the program starts with one, since a newline and the
# indentation behind it may be one token.
PROGRAM_PROMPT = "# merge three experts"


def training_programs(count: int, seed: int) -> list[str]:
    """The distinct programs that the seed is shown, drawn from the grammar."""
    rng = np.random.default_rng(seed)
    programs: dict[str, None] = {}
    while len(programs) < count:
        programs[sample_program(rng).text] = None
    return list(programs)


def program_example(tokenizer: Tokenizer, text: str) -> Example:
    """A program behind the `short` prompt, with the end token."""
    target = tokenizer.encode("\n" + text.strip("\n"), add_special=False)
    return Example(
        prompt=tuple(tokenizer.encode(PROGRAM_PROMPT, add_special=False)),
        target=(*target, tokenizer.eos_ids[0]),
    )


def exercise_example(tokenizer: Tokenizer, exercise: Exercise, *, equation_only: bool) -> Example:
    """An exercise and its solution; of a story only the equation where that alone is taught."""
    prompt = tuple(tokenizer.encode(prompt_of(exercise.question), add_special=False))
    if equation_only and exercise.equation:
        return Example(
            prompt=prompt, target=tuple(tokenizer.encode(exercise.equation, add_special=False))
        )
    target = tokenizer.encode(exercise.solution, add_special=False)
    return Example(prompt=prompt, target=(*target, tokenizer.eos_ids[0]))


class ExerciseStream:
    """Exercises of the training split, each kind as often as its weight says.

    `easy` is the share of hard exercises that are passed over.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int,
        *,
        easy: float = 0.0,
        equation_only: bool = False,
    ):
        self._tokenizer = tokenizer
        self._seed = seed
        self._easy = easy
        self._equation_only = equation_only
        self._rng = np.random.default_rng(seed)
        self._sources: dict[str, Iterator[Exercise]] = {}

    def draw(self, weights: Mapping[str, float]) -> Example:
        kinds = list(weights)
        shares = np.array([weights[kind] for kind in kinds])
        kind = kinds[self._rng.choice(len(kinds), p=shares / shares.sum())]
        if kind not in self._sources:
            self._sources[kind] = exercises(kind, "train", self._rng)
        exercise = next(self._sources[kind])
        while exercise.hard and self._rng.random() < self._easy:
            exercise = next(self._sources[kind])
        return exercise_example(self._tokenizer, exercise, equation_only=self._equation_only)


def packed_batches(
    draw: Callable[[], Example], *, rows: int, length: int, batches: int
) -> list[dict[str, np.ndarray]]:
    """Batches of `rows` packed rows, filled with as many drawn examples as fit: [B, T] each."""
    examples: list[Example] = []
    tokens = 0
    # A little more than fits, since first-fit packing leaves gaps; the surplus is dropped.
    while tokens < batches * rows * length:
        examples.append(draw())
        tokens += len(examples[-1])
    packed = pack(examples, length)
    return [
        {name: array[start : start + rows] for name, array in packed.items()}
        for start in range(0, batches * rows, rows)
    ]
