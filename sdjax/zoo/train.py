"""Training of the zoo from scratch: tokenizer, seed, experts, and the table of accuracies."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from sdjax.core.errors import UserError
from sdjax.core.progress import progress_bar
from sdjax.evaluation.tasks.arithmetic import KINDS
from sdjax.io.atomic_write import make_folder, write_file
from sdjax.io.hf_checkpoint import load_config, load_model
from sdjax.io.model_paths import TRAINING_PROGRAMS
from sdjax.io.tokenizer import load_tokenizer
from sdjax.io.training_programs import TrainingPrograms
from sdjax.merging.scope import select_paths
from sdjax.models.tree import flatten, unflatten
from sdjax.programs.signature import model_signature
from sdjax.sandbox.trusted_identities import candidate_identities
from sdjax.training.fit import fit
from sdjax.training.sft import sft_loss
from sdjax.training.warmstart import signature_digest
from sdjax.zoo.data import ExerciseStream, packed_batches
from sdjax.zoo.evaluator import Evaluator
from sdjax.zoo.programs import (
    SLOTS,
    program_texts,
)
from sdjax.zoo.recipes import (
    EXPERT_LENGTH,
    EXPERT_ROWS,
    EXPERTS,
    MEMORY,
    SEED,
    TRANSFER_EXPERTS,
    ExpertRecipe,
)
from sdjax.zoo.train_seed import data_mesh, train_memory, train_seed, write_stored

logger = logging.getLogger(__name__)

_README = """\
# The zoo

Tiny Llama models that ship with sdjax, as Hugging Face folders in bfloat16. `sdjax zoo train --out
DIR` reproduces them from fixed random seeds. The seed was first trained to solve all problems and
then to make two typical errors: misreading stories with rare wording, and forgetting carries. The
experts are fine-tuned from the seed. Only their MLP tensors differ. Stories require both reading
and calculation, so no expert solves all of them, but a merge can.

Half of the programs that the seed was trained on answer a prompt that shows one or two earlier
programs with scores (`short-memory`). They are children of those programs, made by the grammar: the
better program improved, combined with the other, simplified, or left for something else. The scores
were drawn at random: the seed has learned to continue from the better program, but not which
programs are good.

Each expert learns its specialty in some of the MLP tensors, and in the others it unlearns kinds of
problems outside its specialty. A merge that uses each expert where it learned keeps its specialty:

| expert | learns in | unlearns | in |
|---|---|---|---|
| reader, storyteller | layer 3 | largest, missing | layers 0 to 2 |
| calculator, accountant | `down_proj` | missing, largest | `gate_proj`, `up_proj` |
| judge, detective | layers 0 and 1 | differences, sums | layers 2 and 3 |

The experts were chosen by scores on the calibration split; no test score was used. One
weight per expert should leave at least five points to a short program that gates each expert.
`python -m benchmarks.zoo.headroom` measures that on the same split.

"""

FIRST = "seed.first"  # the seed before it is trained on prompts with memory


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
        FIRST,
        f"{FIRST}.tokenizer",
        *(recipe.name for recipe in (*EXPERTS, *TRANSFER_EXPERTS)),
    }
    existing = {path.name for path in folder.iterdir()} if folder.exists() else set()
    # The README is written last, so a folder with a README but no seed is not a zoo.
    if existing - expected - ({"README.md"} if "seed" in existing else set()):
        raise UserError(
            f"{folder}: contains files that do not belong to a zoo; choose another --out"
        )
    make_folder(folder)
    first, seed = folder / FIRST, folder / "seed"
    jobs: dict[Path, Callable[[], None]] = {}
    if not seed.exists():
        jobs[first] = partial(train_seed, first, SEED)
    jobs |= {
        seed: partial(train_memory, seed, first, MEMORY),
        seed / TRAINING_PROGRAMS: partial(save_training_identities, seed),
    }
    for recipe in (*EXPERTS, *TRANSFER_EXPERTS):
        path = folder / recipe.name
        jobs[path] = partial(train_expert, path, seed, recipe)
    for path, job in jobs.items():
        if not path.exists():
            job()
    return write_table(folder)


def save_training_identities(seed: Path) -> None:
    """Write the training programs and their identities to the seed's folder."""
    signature = model_signature(load_config(seed), SLOTS, "mlp")
    texts = [
        *program_texts(SEED.programs, SEED.seed),
        *program_texts(MEMORY.programs, MEMORY.seed, MEMORY.memory),
    ]
    sources = list(dict.fromkeys(text.source for text in texts))

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
    write_stored(folder, config, unflatten(tensors), seed_folder)
