"""Config sections of what a run's programs are compared with, and of the tuning of both.

They are part of the run's config, `sdjax.search.config`.
"""

from __future__ import annotations

import itertools
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import (
    STRICT,
    NonEmptyStr,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from sdjax.tuning.search import SearchConfig

Hyperparameter = bool | int | float | str
Grid = dict[str, dict[str, Annotated[tuple[Hyperparameter, ...], Field(min_length=1)]]]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BaselinesConfig:
    """Config of the human-designed methods to compare with, tuned on the development problems.

    A grid maps each method to its hyperparameters and their values; every combination is scored. A
    method without hyperparameters ({}) is scored once, with its defaults.

    Attributes:
        paper: the paper's grid.
        fine: a finer grid.
    """

    paper: Grid = Field(default_factory=dict)
    fine: Grid = Field(default_factory=dict)

    def combinations(self, grid: Literal["paper", "fine"]) -> list[tuple[str, dict[str, Any]]]:
        """Return (method, hyperparameters) for each point of a grid, in the order of the file."""
        return [
            (method, dict(zip(axes, values, strict=True)))
            for method, axes in getattr(self, grid).items()
            for values in itertools.product(*axes.values())
        ]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class StructuresConfig:
    """Config of tuning the constants of every structure while it is scored (`score: tuned`).

    Before a rung of the race, numbers with a gradient move by gradient from the best values so
    far, and candidates are sampled around these for the others; see
    `sdjax.search.structure_scores`.

    Attributes:
        steps: gradient steps on training problems before each rung; 0 for none.
        learning_rate: of Adam, as a fraction of the distance between a number's bounds.
        batch: rows of packed training problems per step.
        candidates: candidates per rung in which the numbers without a gradient are sampled.
        rungs: number of first rungs before which numbers are searched, so that the others only
            measure what was found; null for all rungs.
    """

    steps: NonNegativeInt = 10
    learning_rate: PositiveFloat = 0.05
    batch: PositiveInt = 4
    candidates: NonNegativeInt = 2
    rungs: PositiveInt | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunTuningConfig:
    """Config of tuning the numbers of programs.

    Those of every program are tuned a little while it is scored, and those of the best programs
    after the last iteration, each by its own search; see `sdjax.search.tune`.

    Attributes:
        structures: tuning of every program while it is scored, with `score: tuned`.
        programs: number of best programs, of different structures, whose constants are tuned.
        search: settings of each search after the last iteration. Its optimizer is "auto" or
            "cmaes", since it is not known at the start whether the programs have a gradient; with
            "cmaes", structures are tuned without a gradient as well.
    """

    structures: StructuresConfig = Field(default_factory=StructuresConfig)
    programs: NonNegativeInt = 3
    search: SearchConfig = Field(default_factory=lambda: SearchConfig(budget=12))

    @model_validator(mode="after")
    def _check_optimizer(self) -> RunTuningConfig:
        if self.search.optimizer == "gradient":
            raise ValueError(
                "search.optimizer: a run cannot promise a gradient for programs that are not "
                "written yet; choose auto, which uses it where there is one, or cmaes"
            )
        return self


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ControlsConfig:
    """Config of the controls: what a run's programs must beat, at the budget of the run.

    No control evaluates more development problems than the run's own programs did; see
    `sdjax.search.control_search` and `sdjax.search.control_programs`.

    Attributes:
        tuned: human-designed merges whose numbers are tuned, each by its own search: families and
            methods, such as weights, layers, ties or ties:slope; see `sdjax tune --help`.
        random: try random programs of the grammar, as many as the run samples.
        untrained: sample as many programs from the untrained generator; its samples in the first
            iteration count. Without training, they are those of the run.
        max_evaluations: maximum evaluations of the development problems in the search of each
            tuned control; null allows as many as the run's own budget.
    """

    tuned: tuple[NonEmptyStr, ...] = (
        *("weights", "slope", "layers"),
        *("ties", "dare_linear", "breadcrumbs"),
    )
    random: bool = True
    untrained: bool = True
    max_evaluations: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_tuned(self) -> ControlsConfig:
        for name in self.tuned:
            if self.tuned.count(name) > 1:
                raise ValueError(f"tuned: {name!r} is listed twice; remove one")
        return self
