"""Settings of the statistics of a model on data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from sdjax.core.errors import UserError, did_you_mean
from sdjax.merging.signature import STATISTICS

Labels = Literal["model", "data"]


@dataclass(frozen=True, kw_only=True)
class StatisticsConfig:
    """Settings of the statistics and of the tokens that they are computed from.

    Attributes:
        kinds: the statistics: "fisher", "gram", "input_norm".
        labels: whose tokens the log-likelihood of the Fisher information is of: "model", one drawn
            from the model's own distribution at every position of a target, as in its definition,
            or "data", the targets themselves (the empirical Fisher information).
        batch: examples per step.
        max_length: tokens per example; prompts are cut from the left, other texts at the end.
        seed: seed of the tokens that are drawn.
        checkpoint_every: examples after which the sums are stored, so that they can be resumed.
    """

    kinds: tuple[str, ...] = STATISTICS
    labels: Labels = "model"
    batch: int = 8
    max_length: int = 2048
    seed: int = 0
    checkpoint_every: int = 512

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: an unknown kind, or a number below its minimum.
        """
        for kind in self.kinds:
            if kind not in STATISTICS:
                hint = did_you_mean(kind, STATISTICS, f"available: {', '.join(STATISTICS)}")
                raise UserError(f"no statistic {kind!r}; {hint}")
        if not self.kinds:
            raise UserError(f"kinds is empty; available: {', '.join(STATISTICS)}")
        if self.labels not in get_args(Labels):
            raise UserError(f"labels must be model or data, not {self.labels!r}")
        for name, least in (("batch", 1), ("max_length", 2), ("seed", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise UserError(f"{name} must be at least {least}, not {getattr(self, name)}")
