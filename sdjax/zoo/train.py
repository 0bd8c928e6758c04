"""Training of the zoo from scratch: tokenizer, seed, experts, and the table of accuracies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.decoding.config import DecoderConfig
from sdjax.decoding.decoder import Decoder
from sdjax.evaluation.evaluator import evaluate_problems
from sdjax.evaluation.prompts import build_prompts
from sdjax.evaluation.task import Outcome, Problem
from sdjax.evaluation.tasks.arithmetic import KINDS, ArithmeticTask, exercises, prompt_of
from sdjax.io.atomic_write import make_folder, write_file
from sdjax.io.hf_checkpoint import load_config, load_model, write_model
from sdjax.io.model_paths import TRAINING_PROGRAMS
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.io.training_programs import TrainingPrograms
from sdjax.merging.scope import select_paths
from sdjax.models.config import ModelConfig
from sdjax.models.params import init_params
from sdjax.models.tree import flatten, unflatten
from sdjax.models.types import Params
from sdjax.programs.signature import model_signature
from sdjax.sandbox.trusted_identities import candidate_identities
from sdjax.training.fit import compile_step, fit
from sdjax.training.packing import Example
from sdjax.training.sft import sft_loss
from sdjax.training.trainable import split_params
from sdjax.training.warmstart import signature_digest
from sdjax.zoo.data import ExerciseStream, packed_batches
from sdjax.zoo.programs import (
    MAX_TARGET,
    SLOTS,
    program_example,
    program_texts,
    tokenizer_texts,
)
from sdjax.zoo.recipes import (
    EXPERT_LENGTH,
    EXPERT_ROWS,
    EXPERTS,
    SEED,
    TRANSFER_EXPERTS,
    ExpertRecipe,
    SeedRecipe,
    seed_config,
)
from sdjax.zoo.tokenizer import train_tokenizer, write_tokenizer

logger = logging.getLogger(__name__)

_README = """\
# The zoo

Tiny Llama models that ship with sdjax, as Hugging Face folders in bfloat16. `sdjax zoo train --out
DIR` reproduces them from fixed random seeds. The seed was first trained to solve all problems and
then to make two typical errors: misreading stories with rare wording, and forgetting carries. The
experts are fine-tuned from the seed. Only their MLP tensors differ. Stories require both reading
and calculation, so no expert solves all of them, but a merge can.

Each expert learns its specialty in some of the MLP tensors, and in the others it unlearns kinds of
problems outside its specialty. A merge that uses each expert where it learned keeps its specialty:

| expert | learns in | unlearns | in |
|---|---|---|---|
| reader, storyteller | layers 1 and 2 | largest, missing | layers 0 and 3 |
| calculator, accountant | `down_proj` | missing, largest | `gate_proj`, `up_proj` |
| judge, detective | layers 0 and 1 | differences, sums | layers 2 and 3 |

The experts were chosen by scores on the calibration split; no test problem was read. One weight per
expert should leave at least five points to a short program that gates each expert, and each gate
should gain alone. `python -m benchmarks.zoo.headroom` measures both, on the same split.

"""

DECODER = DecoderConfig(slots=160, prefill_batch=160, buckets=(9, 14, 30), max_new_tokens=10)


def train_zoo(folder: Path) -> Path:
    """Train all models of the zoo that are missing from a folder.

    An interrupted call resumes with the first missing model.

    Args:
        folder: folder of the models.

    Returns:
        the path of the README with the table of accuracies.

    Raises:
        UserError: the folder contains other files.
    """
    expected = {
        "seed",
        "seed.tokenizer",
        *(recipe.name for recipe in (*EXPERTS, *TRANSFER_EXPERTS)),
    }
    existing = {path.name for path in folder.iterdir()} if folder.exists() else set()
    # The README is written last, so a folder with a README but no seed is not a zoo.
    if existing - expected - ({"README.md"} if "seed" in existing else set()):
        raise UserError(
            f"{folder}: contains files that do not belong to a zoo; choose another --out"
        )
    make_folder(folder)
    seed = folder / "seed"
    jobs: dict[Path, Callable[[], None]] = {
        seed: partial(train_seed, seed, SEED),
        seed / TRAINING_PROGRAMS: partial(save_training_identities, seed, SEED),
    }
    for recipe in (*EXPERTS, *TRANSFER_EXPERTS):
        path = folder / recipe.name
        jobs[path] = partial(train_expert, path, seed, recipe)
    for path, job in jobs.items():
        if not path.exists():
            job()
    return write_table(folder)


def save_training_identities(seed: Path, recipe: SeedRecipe) -> None:
    """Write the training programs and their identities to the seed's folder."""
    signature = model_signature(load_config(seed), SLOTS, "mlp")
    sources = [text.source for text in program_texts(recipe.programs, recipe.seed)]

    with progress_bar("seed: identities of its training programs", len(sources)) as advance:

        def identities() -> Iterator[int | None]:
            for identity in candidate_identities(sources, signature):
                yield identity
                advance()

        programs = TrainingPrograms.create(
            sources, identities(), signature=signature_digest(signature)
        )
    programs.write(seed)
    logger.info("seed: identities of %d training programs", len(sources))


def write_table(folder: Path) -> Path:
    """Write the zoo's README with a description of each model and its test accuracy by kind."""
    evaluator = Evaluator(
        load_tokenizer(folder / "seed"), load_config(folder / "seed"), split="test"
    )
    about = {"seed": "writes merge programs; misreads rare stories and forgets to carry"}
    about |= {recipe.name: recipe.about for recipe in (*EXPERTS, *TRANSFER_EXPERTS)}
    lines = [
        *_README.splitlines(),
        f"Strict accuracy on {len(evaluator.problems)} test problems, greedy, by kind of problem:",
        "",
        f"| model | purpose | {' | '.join(KINDS)} | all |",
        "|---|---|" + "---|" * (len(KINDS) + 1),
    ]
    for name, description in about.items():
        accuracy = evaluator.accuracies(load_model(folder / name)[1])
        cells = " | ".join(f"{accuracy[kind]:.2f}" for kind in (*KINDS, "all"))
        lines.append(f"| {name} | {description} | {cells} |")
    path = folder / "README.md"
    write_file(path, "\n".join(lines) + "\n")
    return path


def data_mesh() -> Mesh:
    """Return a mesh of all devices for data parallelism."""
    return jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))


def train_seed(folder: Path, recipe: SeedRecipe) -> None:
    """Train the tokenizer and the seed, and write them to `folder`."""
    texts = program_texts(recipe.programs, recipe.seed)
    tokenizer_folder = folder.with_name(f"{folder.name}.tokenizer")
    trained = train_tokenizer([*tokenizer_texts(texts), *_exercise_texts(recipe.seed)])
    config = seed_config(-(-trained.get_vocab_size() // 64) * 64)
    write_tokenizer(trained, tokenizer_folder, config.max_seq_len)
    tokenizer = load_tokenizer(tokenizer_folder)
    programs = [program_example(tokenizer, text) for text in texts]
    programs = [
        program
        for program in programs
        if len(program) <= recipe.length and len(program.target) <= MAX_TARGET
    ]
    logger.info("seed: %d of %d programs are short enough", len(programs), len(texts))
    rng = np.random.default_rng(recipe.seed)

    def next_program() -> Example:
        return programs[int(rng.integers(len(programs)))]

    correct = ExerciseStream(tokenizer, recipe.seed)
    with_errors = ExerciseStream(tokenizer, recipe.seed + 1, reads=False, calculates=False)
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
            batches = zip(
                packed_batches(
                    next_program,
                    rows=recipe.program_rows,
                    length=recipe.length,
                    batches=recipe.interval,
                ),
                packed_batches(
                    partial(stream.sample, weights),
                    rows=recipe.rows - recipe.program_rows,
                    length=recipe.length,
                    batches=recipe.interval,
                ),
                strict=True,
            )
            for index, (program_rows, exercise_rows) in enumerate(batches):
                exercise_rows["weights"] *= recipe.exercise_weight
                batch = {
                    name: np.concatenate([program_rows[name], exercise_rows[name]])
                    for name in program_rows
                }
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
    _write(folder, config, unflatten(trainable), tokenizer_folder)


def train_expert(folder: Path, seed_folder: Path, recipe: ExpertRecipe) -> None:
    """Fine-tune the seed on the recipe's exercises, in its two phases, and write the expert."""
    config, params = load_model(seed_folder, dtype=jnp.float32)
    tokenizer = load_tokenizer(seed_folder)
    tensors = flatten(jax.device_put(params, NamedSharding(data_mesh(), PartitionSpec())))
    for number, phase in enumerate((recipe.specialty, recipe.forgetting)):
        stream = ExerciseStream(
            tokenizer,
            [recipe.seed, number],
            reads=phase.reads,
            calculates=phase.calculates,
            neglected=phase.neglected,
        )
        paths = select_paths(tensors, phase.tensors)
        batches = packed_batches(
            partial(stream.sample, phase.weights),
            rows=EXPERT_ROWS,
            length=EXPERT_LENGTH,
            batches=phase.optimizer.num_steps,
        )
        trained, history = fit(
            sft_loss(config),
            {path: tensors[path] for path in paths},
            {path: tensors[path] for path in tensors if path not in paths},
            batches,
            phase.optimizer,
            title=recipe.name,
        )
        tensors |= trained
        loss, steps = history[-1]["loss"], len(history)
        logger.info("%s, phase %d: loss %.3f after %d steps", recipe.name, number + 1, loss, steps)
    _write(folder, config, unflatten(tensors), seed_folder)


class Evaluator:
    """Evaluator of zoo models on one split of the arithmetic task, with greedy decoding."""

    def __init__(self, tokenizer: Tokenizer, config: ModelConfig, *, split: str) -> None:
        self._tokenizer = tokenizer
        self._task = ArithmeticTask()
        self.problems: list[Problem] = self._task.problems(split)
        self._prompted = build_prompts(self._task, self.problems, tokenizer)
        self._decoder = Decoder(config, DECODER, compute_dtype=jnp.float32)

    def outcomes(self, params: Params) -> list[Outcome]:
        """Evaluate a model and return the outcomes in the order of `problems`."""
        return evaluate_problems(self._decoder, self._tokenizer, params, self._task, self._prompted)

    def accuracies(self, params: Params) -> dict[str, float]:
        """Return the strict accuracy of each kind and, as "all", of all problems."""
        strict = np.array([outcome.strict for outcome in self.outcomes(params)])
        kinds = np.array([problem.kind for problem in self.problems])
        return {kind: float(strict[kinds == kind].mean()) for kind in KINDS} | {
            "all": float(strict.mean())
        }


def _exercise_texts(seed: int) -> Iterator[str]:
    rng = np.random.default_rng(seed)
    for kind in KINDS:
        source = exercises(kind, "train", rng)
        for _ in range(1000):
            exercise = next(source)
            yield prompt_of(exercise.question) + exercise.solution()


def _write(folder: Path, config: ModelConfig, params: Params, assets: Path) -> None:
    stored = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    write_model(folder, config, stored, assets_from=assets)
