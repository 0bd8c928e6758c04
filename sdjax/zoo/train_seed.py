"""Training of the zoo's seed: its tokenizer, programs and exercises, and prompts with memory."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.core.progress import progress_bar
from sdjax.evaluation.tasks.arithmetic import KINDS, exercises, prompt_of
from sdjax.io.hf_checkpoint import load_model, write_model
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.models.config import ModelConfig
from sdjax.models.params import init_params
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import Params
from sdjax.training.fit import compile_step, fit
from sdjax.training.packing import Example
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import split_params
from sdjax.zoo.data import ExerciseStream, packed_batches
from sdjax.zoo.evaluator import Evaluator
from sdjax.zoo.programs import (
    MAX_TARGET,
    ProgramText,
    program_example,
    program_texts,
    tokenizer_texts,
)
from sdjax.zoo.recipes import (
    MemoryRecipe,
    SeedRecipe,
    seed_config,
)
from sdjax.zoo.tokenizer import train_tokenizer, write_tokenizer

logger = logging.getLogger(__name__)


def train_seed(folder: Path, recipe: SeedRecipe) -> None:
    """Train the tokenizer and the seed, and write them to `folder`."""
    texts = program_texts(recipe.programs, recipe.seed)
    tokenizer_folder = folder.with_name(f"{folder.name}.tokenizer")
    trained = train_tokenizer([*tokenizer_texts(texts), *_exercise_texts(recipe.seed)])
    config = seed_config(-(-trained.get_vocab_size() // 64) * 64)
    write_tokenizer(trained, tokenizer_folder, config.max_seq_len)
    tokenizer = load_tokenizer(tokenizer_folder)
    programs = _short_programs(tokenizer, texts, recipe.length)
    rng = np.random.default_rng(recipe.seed)

    def next_program() -> Example:
        return programs[int(rng.integers(len(programs)))]

    correct = ExerciseStream(tokenizer, recipe.seed)
    with_errors = ExerciseStream(tokenizer, recipe.seed + 1, reads=(), calculates=())
    num_steps = recipe.optimizer.num_steps
    errors_start = (1 - recipe.error_fraction) * num_steps
    evaluator = Evaluator(tokenizer, config, split="calibration")
    mesh = data_mesh()
    replicated = NamedSharding(mesh, PartitionSpec())
    params = init_params(config, jax.random.key(recipe.seed), jnp.float32)
    trainable, _ = split_params(jax.device_put(params, replicated), set(flatten(params)))
    init, step = compile_step(sft_loss(config), recipe.optimizer)
    opt_state = init(trainable)
    weights = dict(recipe.weights)
    # Not `fit`: the batches of an interval depend on the accuracy after the previous one.
    with progress_bar("seed", num_steps) as advance:
        for first in range(0, num_steps, recipe.interval):
            stream = correct if first < errors_start else with_errors
            batches = joined_batches(
                next_program, partial(stream.sample, weights), recipe, recipe.interval
            )
            for index, batch in enumerate(batches):
                batch = jax.device_put(batch, NamedSharding(mesh, PartitionSpec("data")))
                trainable, opt_state, metrics = step(trainable, opt_state, {}, batch)
                loss = f"seed: loss {float(metrics['loss']):.3f}" if index % 10 == 0 else None
                advance(description=loss)
            accuracy = evaluator.accuracies(unflatten(trainable))
            # Train less on kinds that are already solved, until the steps with errors begin.
            if first + recipe.interval < errors_start:
                weights = {
                    kind: weight * max(1 - accuracy[kind], 0.2)
                    for kind, weight in recipe.weights.items()
                }
            else:
                weights = dict(recipe.weights)
            summary = " ".join(f"{kind} {accuracy[kind]:.2f}" for kind in KINDS)
            logger.info("seed, step %d of %d: %s", first + recipe.interval, num_steps, summary)
    write_stored(folder, config, unflatten(trainable), tokenizer_folder)


def train_memory(folder: Path, first: Path, recipe: MemoryRecipe) -> None:
    """Train the seed further, mostly on prompts with earlier programs, and write it to `folder`.

    Args:
        folder: folder to write.
        first: folder of the seed that `train_seed` has written.
        recipe: data and number of steps.
    """
    config, params = load_model(first, dtype=jnp.float32)
    tokenizer = load_tokenizer(first)
    programs = _short_programs(
        tokenizer, program_texts(recipe.programs, recipe.seed, recipe.memory), recipe.length
    )
    order = np.random.default_rng(recipe.seed).permutation(len(programs))
    program_stream = (programs[n] for n in itertools.cycle(order))
    exercises = ExerciseStream(tokenizer, recipe.seed, reads=(), calculates=())
    batches = joined_batches(
        partial(next, program_stream),
        partial(exercises.sample, recipe.weights),
        recipe,
        recipe.optimizer.num_steps,
    )
    params = jax.device_put(params, NamedSharding(data_mesh(), PartitionSpec()))
    trainable, frozen = split_params(params, set(flatten(params)))
    trained, history = fit(
        sft_loss(config), trainable, frozen, batches, recipe.optimizer, title="seed, memory"
    )
    logger.info("seed, memory: loss %.3f after %d steps", history[-1]["loss"], len(history))
    write_stored(folder, config, unflatten(frozen | trained), first)


def write_stored(folder: Path, config: ModelConfig, params: Params, assets: Path) -> None:
    """Write a model in bfloat16, with the tokenizer of another folder."""
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    write_model(folder, config, stored, assets_from=assets)


def data_mesh() -> Mesh:
    """Return a mesh of all devices for data parallelism."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def _short_programs(
    tokenizer: Tokenizer, texts: Sequence[ProgramText], length: int
) -> list[Example]:
    """Return the examples that fit into a row, and whose program is not too long."""
    examples = (program_example(tokenizer, text) for text in texts)
    short = [x for x in examples if len(x) <= length and len(x.target) <= MAX_TARGET]
    logger.info("seed: %d of %d programs are short enough", len(short), len(texts))
    return short


def joined_batches(
    next_program: Callable[[], Example],
    next_exercise: Callable[[], Example],
    recipe: SeedRecipe | MemoryRecipe,
    count: int,
) -> Iterator[dict[str, np.ndarray]]:
    """Yield batches of packed rows with programs, and rows with exercises."""
    pack_rows = partial(packed_batches, length=recipe.length, batches=count)
    batches = zip(
        pack_rows(next_program, rows=recipe.program_rows),
        pack_rows(next_exercise, rows=recipe.rows - recipe.program_rows),
        strict=True,
    )
    for program_rows, exercise_rows in batches:
        exercise_rows["weights"] *= recipe.exercise_weight
        yield {
            name: np.concatenate([program_rows[name], exercise_rows[name]]) for name in program_rows
        }


def _exercise_texts(seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        source = exercises(kind, "train", rng)
        for _ in range(1000):
            exercise = next(source)
            yield prompt_of(exercise.question) + exercise.solution()
