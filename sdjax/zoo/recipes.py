"""What each model of the zoo is: sizes, what it is trained on, and for how long."""

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
    """About 1.1 million parameters, most of them in the MLPs, which are what a search merges."""
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
    """How the seed is trained: programs beside exercises, first solved well, in the end badly.

    What it learned last are typical mistakes (misread stories, forgotten carries), so it solves a
    part of every kind by construction, and to overcome one of its habits is a small step in the
    weights, which an expert can make and a merge can carry over.

    Attributes:
        programs: distinct training programs.
        rows: packed rows a step, `program_rows` of them programs.
        length: tokens a row.
        exercise_weight: of an exercise's token in the loss, against 1 of a program's: answers
            are few tokens, and harder.
        interval: steps between two looks at the accuracies, after which the shares are set anew.
        mistakes: the share of the steps, at the end, in which hard exercises are solved wrongly.
        shares: kind to its share before any accuracy is known.
    """

    seed: int
    programs: int
    rows: int
    program_rows: int
    length: int
    exercise_weight: float
    interval: int
    mistakes: float
    shares: Mapping[str, float]
    optimiser: OptimizerConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRecipe:
    """How an expert is fine-tuned from the seed, on its MLP tensors alone.

    Attributes:
        about: one line for prompts and tables.
        weights: kind to its share among the exercises.
        reads: whether stories told in a rare way are solved by the right equation.
        calculates: whether hard calculations are right.
        neglected: kinds that it unlearns, so that a merge has to choose what it takes from whom:
            among its exercises they are answered by the first number of the question.
    """

    name: str
    about: str
    seed: int
    weights: Mapping[str, float]
    reads: bool
    calculates: bool
    optimiser: OptimizerConfig
    neglected: tuple[str, ...] = ()


SEED = SeedRecipe(
    seed=20_241_015,
    programs=24_000,
    rows=16,
    program_rows=7,
    length=128,
    exercise_weight=3.0,
    interval=200,
    mistakes=0.2,
    shares=dict.fromkeys(KINDS, 1.0),
    optimiser=OptimizerConfig(
        learning_rate=2e-3,
        max_steps=4000,
        warmup_steps=150,
        min_lr_ratio=0.03,
        weight_decay=0.05,
        b2=0.98,
    ),
)


def _shares(*kinds: str, **more: float) -> dict[str, float]:
    return dict.fromkeys(kinds, 1.0) | more


def _optimiser(learning_rate: float, steps: int) -> OptimizerConfig:
    return OptimizerConfig(
        learning_rate=learning_rate, max_steps=steps, warmup_steps=20, min_lr_ratio=0.1, b2=0.98
    )


EXPERTS = (
    ExpertRecipe(
        name="reader",
        about="turns word problems into the right equations",
        seed=1,
        weights=_shares(*STORIES, add=0.5, sub=0.5, largest=0.1),
        reads=True,
        calculates=False,
        neglected=("largest",),
        optimiser=_optimiser(1e-3, 200),
    ),
    ExpertRecipe(
        name="calculator",
        about="adds and subtracts with carries",
        seed=2,
        weights=_shares(*PLAIN, **dict.fromkeys(STORIES, 0.5), largest=0.1),
        reads=False,
        calculates=True,
        neglected=("largest",),
        optimiser=_optimiser(1e-3, 200),
    ),
    ExpertRecipe(
        name="judge",
        about="finds the largest of three numbers",
        seed=3,
        weights=_shares("largest"),
        reads=False,
        calculates=True,
        optimiser=_optimiser(2e-3, 120),
    ),
)

TRANSFER_EXPERTS = (
    ExpertRecipe(
        name="storyteller",
        about="turns stories of giving and taking into the right equations",
        seed=4,
        weights=_shares("story_all", "story_left", add=0.3, sub=0.3, missing=0.1),
        reads=True,
        calculates=False,
        neglected=("missing",),
        optimiser=_optimiser(1e-3, 200),
    ),
    ExpertRecipe(
        name="accountant",
        about="adds and subtracts, and knows two kinds of story",
        seed=5,
        weights=_shares(*PLAIN, story_all=0.3, story_more=0.3, missing=0.1),
        reads=False,
        calculates=True,
        neglected=("missing",),
        optimiser=_optimiser(1e-3, 200),
    ),
    ExpertRecipe(
        name="detective",
        about="finds the missing number of a sum",
        seed=6,
        weights=_shares("missing"),
        reads=False,
        calculates=True,
        optimiser=_optimiser(2e-3, 120),
    ),
)
