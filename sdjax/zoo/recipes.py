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
        programs: number of distinct training programs.
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
class ExpertRecipe:
    """Recipe for fine-tuning an expert from the seed; only MLP tensors are trained.

    Attributes:
        name: name of the model in the zoo.
        about: one-line description for prompts and tables.
        seed: seed of the random generator.
        weights: sampling weight of each kind of exercise.
        reads: whether stories with rare wording have the correct equation.
        calculates: whether hard calculations are correct.
        optimizer: optimizer and number of steps.
        neglected: kinds that the expert unlearns, because its training data answers them with the
            first number of the question. A good merge must therefore treat experts differently.
    """

    name: str
    about: str
    seed: int
    weights: Mapping[str, float]
    reads: bool
    calculates: bool
    optimizer: OptimizerConfig
    neglected: tuple[str, ...] = ()


SEED = SeedRecipe(
    seed=20_241_015,
    programs=24_000,
    rows=16,
    program_rows=7,
    length=128,
    exercise_weight=3.0,
    interval=200,
    error_fraction=0.2,
    weights=dict.fromkeys(KINDS, 1.0),
    optimizer=OptimizerConfig(
        learning_rate=2e-3,
        max_steps=4000,
        warmup_steps=150,
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


EXPERTS = (
    ExpertRecipe(
        name="reader",
        about="turns word problems into the right equations",
        seed=1,
        weights=_weights(*STORIES, add=0.5, sub=0.5, largest=0.1),
        reads=True,
        calculates=False,
        neglected=("largest",),
        optimizer=_optimizer(1e-3, 200),
    ),
    ExpertRecipe(
        name="calculator",
        about="adds and subtracts with carries",
        seed=2,
        weights=_weights(*PLAIN, **dict.fromkeys(STORIES, 0.5), largest=0.1),
        reads=False,
        calculates=True,
        neglected=("largest",),
        optimizer=_optimizer(1e-3, 200),
    ),
    ExpertRecipe(
        name="judge",
        about="finds the largest of three numbers",
        seed=3,
        weights=_weights("largest"),
        reads=False,
        calculates=True,
        optimizer=_optimizer(2e-3, 120),
    ),
)

TRANSFER_EXPERTS = (
    ExpertRecipe(
        name="storyteller",
        about="turns stories of giving and taking into the right equations",
        seed=4,
        weights=_weights("story_all", "story_left", add=0.3, sub=0.3, missing=0.1),
        reads=True,
        calculates=False,
        neglected=("missing",),
        optimizer=_optimizer(1e-3, 200),
    ),
    ExpertRecipe(
        name="accountant",
        about="adds and subtracts, and knows two kinds of story",
        seed=5,
        weights=_weights(*PLAIN, story_all=0.3, story_more=0.3, missing=0.1),
        reads=False,
        calculates=True,
        neglected=("missing",),
        optimizer=_optimizer(1e-3, 200),
    ),
    ExpertRecipe(
        name="detective",
        about="finds the missing number of a sum",
        seed=6,
        weights=_weights("missing"),
        reads=False,
        calculates=True,
        optimizer=_optimizer(2e-3, 120),
    ),
)
