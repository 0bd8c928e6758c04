"""What each model of the zoo is: sizes, what it is trained on, and for how long."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from sdjax.evaluation.arithmetic import KINDS
from sdjax.models.config import ModelConfig
from sdjax.training.fit import OptimiserSettings
from sdjax.zoo.tokenizer import END_ID

PLAIN = ("add", "sub", "chain")
STORIES = ("story_add", "story_sub", "story_chain")


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
        context=512,
        rope_theta=10_000.0,
        norm_eps=1e-5,
        tie_embeddings=True,
        eos_tokens=(END_ID,),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SeedRecipe:
    """How the seed is trained: programs beside exercises, the kinds it is weak at more often.

    Attributes:
        programs: distinct training programs.
        rows: packed rows a step, `program_rows` of them programs.
        length: tokens a row.
        exercise_weight: of an exercise's token in the loss, against 1 of a program's: answers
            are few tokens, and harder.
        easy: share of the hard exercises that are passed over.
        interval: steps between two looks at the accuracies, after which the shares are set anew.
        shares: kind to its share before any accuracy is known; stories are long.
        targets: kind to the accuracy from which on it is hardly shown.
    """

    seed: int
    programs: int
    rows: int
    program_rows: int
    length: int
    exercise_weight: float
    easy: float
    interval: int
    shares: Mapping[str, float]
    targets: Mapping[str, float]
    optimiser: OptimiserSettings


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExpertRecipe:
    """How an expert is fine-tuned from the seed, on its MLP tensors alone.

    Attributes:
        about: one line for prompts and tables.
        weights: kind to its share among the exercises.
        equation_only: whether stories are taught up to the equation, without its value.
    """

    name: str
    about: str
    seed: int
    weights: Mapping[str, float]
    optimiser: OptimiserSettings
    equation_only: bool = False


SEED = SeedRecipe(
    seed=20_241_015,
    programs=24_000,
    rows=16,
    program_rows=5,
    length=128,
    interval=200,
    exercise_weight=3.0,
    easy=0.93,
    shares={kind: 0.3 if kind in STORIES else 1.0 for kind in KINDS},
    targets=dict.fromkeys(KINDS, 0.6) | dict.fromkeys(("chain", *STORIES), 0.45),
    optimiser=OptimiserSettings(
        learning_rate=2e-3, steps=2600, warmup=150, final=0.03, weight_decay=0.05, b2=0.98
    ),
)


def _mixture(own: tuple[str, ...], replay: float) -> dict[str, float]:
    """Equal shares of the own kinds; the others share `replay` of the whole."""
    others = [kind for kind in KINDS if kind not in own]
    return {kind: (1 - replay) / len(own) for kind in own} | {
        kind: replay / len(others) for kind in others if replay > 0
    }


def _optimiser(learning_rate: float, steps: int) -> OptimiserSettings:
    return OptimiserSettings(
        learning_rate=learning_rate, steps=steps, warmup=20, final=0.1, b2=0.98
    )


EXPERTS = (
    ExpertRecipe(
        name="reader",
        about="turns word problems into equations",
        seed=1,
        weights=_mixture(STORIES, replay=0.2),
        equation_only=True,
        optimiser=_optimiser(1e-3, 200),
    ),
    ExpertRecipe(
        name="calculator",
        about="adds and subtracts",
        seed=2,
        weights=_mixture(PLAIN, replay=0.2),
        optimiser=_optimiser(1e-3, 200),
    ),
    ExpertRecipe(
        name="judge",
        about="finds the largest of three numbers",
        seed=3,
        weights=_mixture(("largest",), replay=0.0),
        optimiser=_optimiser(2e-3, 120),
    ),
)

TRANSFER_EXPERTS = (
    ExpertRecipe(
        name="storyteller",
        about="turns stories of taking away into equations",
        seed=4,
        weights=_mixture(("story_sub", "story_chain"), replay=0.2),
        equation_only=True,
        optimiser=_optimiser(1e-3, 200),
    ),
    ExpertRecipe(
        name="accountant",
        about="adds up and takes away in one line",
        seed=5,
        weights=_mixture(("add", "chain"), replay=0.2),
        optimiser=_optimiser(1e-3, 200),
    ),
    ExpertRecipe(
        name="detective",
        about="finds the missing number of a sum",
        seed=6,
        weights=_mixture(("missing",), replay=0.0),
        optimiser=_optimiser(2e-3, 120),
    ),
)
