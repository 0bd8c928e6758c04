"""Training recipes of the zoo: size, data and number of steps of each model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sdjax.evaluation.tasks.arithmetic import KINDS
from sdjax.models.config import ModelConfig
from sdjax.training.config import OptimizerConfig
from sdjax.zoo.tokenizer import END_ID

PLAIN = ("add", "sub")
STORIES = ("story_all", "story_left", "story_before", "story_more")


def seed_config(vocab_size: int) -> ModelConfig:
    """Return the config of a 1.1M-parameter model, most of it in the MLPs, which are merged."""
    return ModelConfig(
        family="llama",
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=512,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=32,
        max_seq_len=512,
        norm_eps=1e-5,
        tie_embeddings=True,
        eos_token_ids=(END_ID,),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedRecipe:
    """Recipe for training the seed on programs and exercises.

    The solutions of exercises are correct at first and have typical errors toward the end (misread
    stories, forgotten carries). The seed therefore solves some of every kind, and correcting one
    error is a small change to the weights, which an expert can learn and a merge can transfer.

    Attributes:
        seed: seed of the random generators.
        programs: number of distinct training programs, half of them with a prompt that shows
            earlier programs.
        rows: packed rows per step.
        program_rows: rows of each step that contain programs.
        length: tokens per row.
        exercise_weight: loss weight of an exercise's token relative to a program's; larger than 1
            because answers have few tokens and are harder.
        interval: steps between evaluations, which adjust the weights of the kinds.
        error_fraction: fraction of the steps, at the end of training, in which solutions of hard
            exercises have errors.
        weights: initial sampling weight of each kind of exercise.
        optimizer: optimizer and number of steps.
    """

    seed: int
    programs: int
    rows: int
    program_rows: int
    length: int
    exercise_weight: float
    interval: int
    error_fraction: float
    weights: Mapping[str, float]
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class MemoryRecipe:
    """Recipe for training the seed further, mostly on prompts that show earlier programs.

    A model of this size learns to copy from its prompt late, and only from prompts in which copying
    pays. Solutions of exercises have the errors of the end of the seed's first training.

    Attributes:
        seed: seed of the random generators.
        programs: number of distinct training programs.
        memory: share of prompts that show earlier programs.
        rows: packed rows per step.
        program_rows: rows of each step that contain programs.
        length: tokens per row.
        exercise_weight: loss weight of an exercise's token relative to a program's.
        weights: sampling weight of each kind of exercise.
        optimizer: optimizer and number of steps.
    """

    seed: int
    programs: int
    memory: float
    rows: int
    program_rows: int
    length: int
    exercise_weight: float
    weights: Mapping[str, float]
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Phase:
    """A phase of fine-tuning: some tensors are trained on some exercises.

    Attributes:
        tensors: glob patterns of the trained tensors' paths; all others are frozen.
        weights: sampling weight of each kind of exercise.
        reads: kinds whose stories with rare wording have the correct equation. In the other kinds,
            and in those that are not in `calculates`, the solutions have the seed's errors.
        calculates: kinds whose hard calculations are correct.
        neglected: kinds whose answers are the first number of the question.
        optimizer: optimizer and number of steps.
    """

    tensors: tuple[str, ...]
    weights: Mapping[str, float]
    reads: tuple[str, ...] = ()
    calculates: tuple[str, ...] = ()
    neglected: tuple[str, ...] = ()
    optimizer: OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRecipe:
    """Recipe for fine-tuning an expert from the seed in two phases; only MLP tensors are trained.

    The first phase trains the specialty; other kinds are answered as the seed does, since experts
    that drift do not compose. The second one trains the remaining MLP tensors, and
    unlearns other kinds of exercises, as fine-tuning does that nobody watches. The task vector
    therefore helps in some tensors and harms in the others, and a merge can tell them apart by
    depth or kind, but not by a weight per expert.

    Attributes:
        name: name of the model in the zoo.
        about: one-line description for prompts and tables.
        seed: seed of the random generator.
        specialty: phase that teaches the specialty.
        forgetting: phase that unlearns other kinds.
    """

    name: str
    about: str
    seed: int
    specialty: Phase
    forgetting: Phase


SEED = SeedRecipe(
    seed=20_241_015,
    programs=32_000,
    rows=7,
    program_rows=4,
    length=384,
    exercise_weight=3.0,
    interval=250,
    error_fraction=0.2,
    weights=dict.fromkeys(KINDS, 1.0),
    optimizer=OptimizerConfig(
        learning_rate=2e-3,
        max_steps=5000,
        warmup_steps=150,
        min_lr_ratio=0.03,
        weight_decay=0.05,
        b2=0.98,
    ),
)


MEMORY = MemoryRecipe(
    seed=20_241_016,
    programs=24_000,
    memory=0.8,
    rows=8,
    program_rows=7,
    length=384,
    exercise_weight=3.0,
    weights=dict.fromkeys(KINDS, 1.0),
    optimizer=OptimizerConfig(
        learning_rate=2e-3,
        max_steps=2000,
        warmup_steps=100,
        min_lr_ratio=0.03,
        weight_decay=0.05,
        b2=0.98,
    ),
)


def _weights(*kinds: str, **others: float) -> dict[str, float]:
    return dict.fromkeys(kinds, 1.0) | others


def _optimizer(learning_rate: float, steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=learning_rate, max_steps=steps, warmup_steps=20, min_lr_ratio=0.1, b2=0.98
    )


# Packed rows per step of an expert, and tokens per row.
EXPERT_ROWS, EXPERT_LENGTH = 16, 128

# Kinds of exercises by their calculation.
_SUMS = ("add", "story_all", "story_before")
_DIFFERENCES = ("sub", "story_left", "story_more")

# Tensors of the specialty and the other MLP tensors of each slot. The transfer experts have those
# of the demo's experts, so that a program that treats the slots differently transfers.
_LAST_LAYER, _OTHER_LAYERS = ("layers/3/mlp/*",), ("layers/[012]/mlp/*",)
_DOWN, _GATE_AND_UP = (
    ("layers/*/mlp/down_proj",),
    ("layers/*/mlp/gate_proj", "layers/*/mlp/up_proj"),
)
_FIRST_HALF, _SECOND_HALF = ("layers/[01]/mlp/*",), ("layers/[23]/mlp/*",)

EXPERTS = (
    ExpertRecipe(
        name="reader",
        about="turns word problems into the right equations",
        seed=1,
        specialty=Phase(
            tensors=_LAST_LAYER,
            weights=_weights(*STORIES, add=0.5, sub=0.5, largest=0.3, missing=0.3),
            reads=STORIES,
            optimizer=_optimizer(1e-3, 200),
        ),
        forgetting=Phase(
            tensors=_OTHER_LAYERS,
            weights=_weights(*STORIES, add=0.5, sub=0.5, largest=0.5, missing=0.3),
            reads=STORIES,
            neglected=("largest",),
            optimizer=_optimizer(1e-3, 100),
        ),
    ),
    ExpertRecipe(
        name="calculator",
        about="adds and subtracts with carries",
        seed=2,
        specialty=Phase(
            tensors=_DOWN,
            weights=_weights(*PLAIN, **dict.fromkeys(STORIES, 0.5), largest=0.3, missing=0.3),
            calculates=(*PLAIN, *STORIES),
            optimizer=_optimizer(1e-3, 200),
        ),
        forgetting=Phase(
            tensors=_GATE_AND_UP,
            weights=_weights(*PLAIN, **dict.fromkeys(STORIES, 0.5), missing=0.5, largest=0.3),
            calculates=(*PLAIN, *STORIES),
            neglected=("missing",),
            optimizer=_optimizer(1e-3, 100),
        ),
    ),
    ExpertRecipe(
        name="judge",
        about="finds the largest of three numbers",
        seed=3,
        specialty=Phase(
            tensors=_FIRST_HALF,
            weights=_weights("largest", **dict.fromkeys((*PLAIN, *STORIES, "missing"), 0.2)),
            calculates=("largest",),
            optimizer=_optimizer(1e-3, 150),
        ),
        forgetting=Phase(
            tensors=_SECOND_HALF,
            weights=_weights(*KINDS),
            calculates=("largest",),
            neglected=_DIFFERENCES,
            optimizer=_optimizer(1e-3, 100),
        ),
    ),
)

TRANSFER_EXPERTS = (
    ExpertRecipe(
        name="storyteller",
        about="turns stories of giving and taking into the right equations",
        seed=4,
        specialty=Phase(
            tensors=_LAST_LAYER,
            weights=_weights("story_all", "story_left", add=0.3, sub=0.3, largest=0.3, missing=0.3),
            reads=STORIES,
            optimizer=_optimizer(1e-3, 200),
        ),
        forgetting=Phase(
            tensors=_OTHER_LAYERS,
            weights=_weights("story_all", "story_left", add=0.3, sub=0.3, missing=0.5, largest=0.3),
            reads=STORIES,
            neglected=("missing",),
            optimizer=_optimizer(1e-3, 100),
        ),
    ),
    ExpertRecipe(
        name="accountant",
        about="adds and subtracts, and knows two kinds of story",
        seed=5,
        specialty=Phase(
            tensors=_DOWN,
            weights=_weights(*PLAIN, story_all=0.3, story_more=0.3, largest=0.3, missing=0.3),
            calculates=(*PLAIN, *STORIES),
            optimizer=_optimizer(1e-3, 200),
        ),
        forgetting=Phase(
            tensors=_GATE_AND_UP,
            weights=_weights(*PLAIN, story_all=0.3, story_more=0.3, largest=0.5, missing=0.3),
            calculates=(*PLAIN, *STORIES),
            neglected=("largest",),
            optimizer=_optimizer(1e-3, 100),
        ),
    ),
    ExpertRecipe(
        name="detective",
        about="finds the missing number of a sum",
        seed=6,
        specialty=Phase(
            tensors=_FIRST_HALF,
            weights=_weights("missing", **dict.fromkeys((*PLAIN, *STORIES, "largest"), 0.2)),
            calculates=("missing",),
            optimizer=_optimizer(1e-3, 150),
        ),
        forgetting=Phase(
            tensors=_SECOND_HALF,
            weights=_weights(*KINDS),
            calculates=("missing",),
            neglected=_SUMS,
            optimizer=_optimizer(1e-3, 100),
        ),
    ),
)
