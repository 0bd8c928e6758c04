"""Config schema of the `selection:` section: which samples the generator is trained on."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, NonNegativeFloat, NonNegativeInt, Percent, PositiveInt


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SelectionConfig:
    """Config of making preference pairs from the samples of a run.

    The defaults are the paper's rules. EvoTune (Surina et al. 2025, arXiv 2504.05108) pairs the
    better half of a prompt's programs with the worse half and with every failed output, of all
    iterations: `chosen_percent: 50`, `rejected_percent: 50`, `elites: 0`, `refused: true`,
    `within_prompt: true`, `iterations: all`, `max_pairs_per_rejected: 1` and a `min_percentile`.

    Attributes:
        chosen_percent: percentage of the distinct scored programs to choose, best first.
        rejected_percent: percentage of the distinct scored programs to reject, worst first.
        elites: number of best programs of each earlier iteration that are also chosen.
        min_gap: minimum difference of the scores within a pair of scored programs.
        min_change: minimum change to the seed that a chosen program must make; see
            `sdjax.search.score_types.Application`.
        min_percentile: percentile of the scores of the distinct programs that a chosen program must
            reach; 0 demands nothing.
        refused: also reject every sample without an admissible program.
        duplicates: also reject every sample whose program the search has found before, its parents
            included (as ThetaEvolve penalizes them, arXiv 2511.23473); they are never chosen. If
            false, they count as the program they repeat.
        unchanged: also reject every sample whose program changes the seed by less than
            `min_change`, whatever its score.
        within_prompt: whether pairs, and the percentages, are of samples of the same prompt only.
        iterations: "current" makes pairs of the samples of the iteration alone; "all" makes them
            of the samples of all iterations so far, which leaves no earlier `elites`.
        max_pairs_per_chosen: maximum number of pairs in which one program is the chosen one.
        max_pairs_per_rejected: maximum number of pairs in which one sample is the rejected one.
        max_pairs: maximum number of pairs, above which they are subsampled; null keeps all.
    """

    RENAMED_KEYS: ClassVar[dict[str, str]] = {
        "winners_percent": "chosen_percent",
        "losers_percent": "rejected_percent",
    }

    chosen_percent: Percent = 3.0
    rejected_percent: Percent = 10.0
    elites: NonNegativeInt = 3
    min_gap: NonNegativeFloat = 0.0
    min_change: NonNegativeFloat = 1e-3
    min_percentile: Annotated[float, Field(ge=0, lt=100)] = 0.0
    refused: bool = False
    duplicates: bool = False
    unchanged: bool = False
    within_prompt: bool = False
    iterations: Literal["current", "all"] = "current"
    max_pairs_per_chosen: PositiveInt | None = None
    max_pairs_per_rejected: PositiveInt | None = None
    max_pairs: NonNegativeInt | None = None

    @model_validator(mode="after")
    def _check_percentages(self) -> SelectionConfig:
        if self.chosen_percent + self.rejected_percent > 100:
            raise ValueError(
                f"chosen_percent ({self.chosen_percent}) and rejected_percent "
                f"({self.rejected_percent}) must sum to at most 100"
            )
        return self
