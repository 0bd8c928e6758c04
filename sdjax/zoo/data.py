"""Training data of the zoo: arithmetic exercises, and packed batches."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from sdjax.evaluation.tasks.arithmetic import KINDS, Exercise, exercises, prompt_of
from sdjax.io.tokenizer import Tokenizer
from sdjax.training.packing import Example, pack


def exercise_example(
    tokenizer: Tokenizer, exercise: Exercise, *, reads: bool, calculates: bool, attends: bool
) -> Example:
    """Return an exercise with its solution; see `Exercise.solution` for the arguments."""
    solution = exercise.solution(reads=reads, calculates=calculates, attends=attends)
    target = tokenizer.encode(solution, add_special=False)
    return Example(
        prompt=tuple(tokenizer.encode(prompt_of(exercise.question), add_special=False)),
        target=(*target, tokenizer.eos_ids[0]),
    )


class ExerciseStream:
    """An infinite stream of exercises of the training split with their solutions."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        seed: int | Sequence[int],
        *,
        reads: Collection[str] = tuple(KINDS),
        calculates: Collection[str] = tuple(KINDS),
        neglected: Collection[str] = (),
    ) -> None:
        """Create the stream.

        Args:
            tokenizer: the zoo's tokenizer.
            seed: seed of the random generator.
            reads: kinds whose stories with rare wording are understood.
            calculates: kinds whose hard calculations are correct.
            neglected: kinds whose answers ignore the question.
        """
        self._example = partial(exercise_example, tokenizer)
        self._reads, self._calculates, self._neglected = reads, calculates, neglected
        self._rng = np.random.default_rng(seed)
        self._sources = {kind: exercises(kind, "train", self._rng) for kind in KINDS}

    def sample(self, weights: Mapping[str, float]) -> Example:
        """Return an exercise of a random kind; `weights` are proportional to probabilities."""
        kinds = list(weights)
        shares = np.array([weights[kind] for kind in kinds])
        kind = kinds[self._rng.choice(len(kinds), p=shares / shares.sum())]
        return self._example(
            next(self._sources[kind]),
            reads=kind in self._reads,
            calculates=kind in self._calculates,
            attends=kind not in self._neglected,
        )


def exercise_rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Return training exercises with correct solutions, as rows of prompt and completion.

    `configs/exercises.jsonl` contains 1,000 of them, with seed 0.
    """
    return [
        {"prompt": prompt_of(exercise.question), "completion": exercise.solution()}
        for exercise in itertools.islice(_distinct_exercises(seed), count)
    ]


def preference_rows(count: int, *, seed: int) -> list[dict[str, str]]:
    """Return exercises that invite a typical error, as rows of prompt, chosen and rejected.

    The rejected solution has the error. `configs/preferences.jsonl` contains 500 rows, with seed 0.
    """
    rows = (
        {
            "prompt": prompt_of(exercise.question),
            "chosen": exercise.solution(),
            "rejected": exercise.solution(reads=False, calculates=False),
        }
        for exercise in _distinct_exercises(seed)
    )
    return list(itertools.islice((row for row in rows if row["chosen"] != row["rejected"]), count))


def _distinct_exercises(seed: int) -> Iterator[Exercise]:
    """Yield exercises of the training split, cycling through the kinds, without duplicates."""
    rng = np.random.default_rng(seed)
    sources = [exercises(kind, "train", rng) for kind in KINDS]
    seen: set[str] = set()
    for source in itertools.cycle(sources):
        exercise = next(source)
        if exercise.question not in seen:
            seen.add(exercise.question)
            yield exercise


def packed_batches(
    sample: Callable[[], Example], *, rows: int, length: int, batches: int
) -> list[dict[str, np.ndarray]]:
    """Sample as many examples as fit into the batches; return them as packed rows.

    `training.packing.target_batches` needs a finite dataset, but these samples never end.

    Args:
        sample: function that returns the next example.
        rows: rows per batch.
        length: tokens per row.
        batches: number of batches.
    """
    examples: list[Example] = []
    tokens = 0
    # Sample slightly too many examples, because packing leaves gaps; the surplus is dropped.
    while tokens < batches * rows * length:
        examples.append(sample())
        tokens += len(examples[-1])
    packed = pack(examples, length)
    return [
        {name: array[start : start + rows] for name, array in packed.items()}
        for start in range(0, batches * rows, rows)
    ]
