"""Parts shared by the searches: settings, evaluations within a budget, and bounds.

Axes: parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import numpy as np
from pydantic import model_validator
from pydantic.dataclasses import dataclass

from sdjax.core.config import STRICT, NonNegativeInt, PositiveFloat, PositiveInt
from sdjax.core.errors import UserError, did_you_mean
from sdjax.tuning.patterns import rounded
from sdjax.tuning.trace import Trace
from sdjax.tuning.types import Tunable


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SearchConfig:
    """Settings of a search.

    Attributes:
        budget: number of development evaluations.
        optimizer: "cmaes"; or "auto", by gradient if the task has training problems and the merge
            is differentiable. If it is so in some of the numbers only, CMA-ES tunes all of them
            with the second half of the budget, from the best values so far. "gradient" is an error
            where "auto" would use CMA-ES; only `sdjax tune` has it.
        starts: searches from different initial values, which share the budget; the first starts
            from the program's own values, the others at random.
        seed: seed of initial values, of the order of the training problems and of CMA-ES.
        steps: gradient steps per start.
        learning_rate: of Adam, as a fraction of the distance between a number's bounds.
        batch: rows of packed training problems per step.
        evaluate_every: gradient steps between evaluations; more if the budget requires it.
        patience: evaluations by gradient, in a row, without improvement after which a start ends;
            in the controls of a run also generations of CMA-ES. In `sdjax tune`, CMA-ES ignores
            it.
        sigma: initial standard deviation of CMA-ES, as a fraction of the distance between bounds.
        population: candidates per generation of CMA-ES; by default 4 + 3 log(parameters).
    """

    budget: int
    optimizer: Literal["auto", "gradient", "cmaes"] = "auto"
    starts: PositiveInt = 1
    seed: NonNegativeInt = 0
    steps: PositiveInt = 60
    learning_rate: PositiveFloat = 0.02
    batch: PositiveInt = 8
    evaluate_every: PositiveInt = 10
    patience: PositiveInt = 3
    sigma: PositiveFloat = 0.2
    population: PositiveInt | None = None

    @model_validator(mode="after")
    def _check_budget(self) -> SearchConfig:
        if self.budget < 1:
            raise ValueError(
                f"budget: {self.budget} is less than one evaluation of the development problems; "
                "give 1 or more"
            )
        if self.budget < self.starts:
            raise ValueError(
                f"budget: {self.budget} is less than one evaluation for each of {self.starts} "
                "starts; raise it, or lower starts"
            )
        return self

    def share(self, start: int) -> int:
        """Return the number of evaluations of one start."""
        return self.budget // self.starts + (start < self.budget % self.starts)


class Box:
    """The values scaled to [0, 1] between their bounds."""

    def __init__(self, tunable: Tunable) -> None:
        self._start = tunable.start
        self._low, high = tunable.bounds.T
        self.width = high - self._low

    def values(self, scaled: np.ndarray) -> np.ndarray:
        """Return values [parameters] within the bounds, rounded to the digits that are written."""
        exact = self._low + np.clip(scaled, 0, 1) * self.width
        # Rounded to the digits that are written at the end, so that the file scores the same.
        written = np.array([rounded(value) for value in exact])
        return np.clip(written, self._low, self._low + self.width)

    def scaled(self, values: Sequence[float] | np.ndarray) -> np.ndarray:
        """Return values [parameters] scaled to [0, 1]."""
        return (np.asarray(values) - self._low) / self.width

    def initial(self, start: int, seed: int) -> np.ndarray:
        """Return the scaled initial values of one start, [parameters]."""
        if start == 0:
            return self.scaled(self._start)
        return np.random.default_rng([seed, start]).uniform(size=len(self.width))


class Evaluations:
    """Development evaluations within a budget; each is an event of the trace.

    Attributes:
        count: number of evaluations so far.
        best: the event with the best score, the later one of equals; None before the first.
        on_evaluation: called with each event, whether computed or replayed.
    """

    def __init__(
        self,
        evaluate: Callable[[np.ndarray], Mapping[str, Any]],
        budget: int,
        trace: Trace,
    ) -> None:
        """Wrap the evaluation of one candidate.

        Args:
            evaluate: values [parameters] to a JSON-compatible result with the key "score".
            budget: number of evaluations.
            trace: the trace.
        """
        self._evaluate = evaluate
        self._budget = budget
        self._trace = trace
        self.on_evaluation: Callable[[Mapping[str, Any]], None] = lambda event: None
        self.count = 0
        self.best: dict[str, Any] | None = None

    def __call__(self, values: np.ndarray, **where: int) -> float:
        """Return the development score of a candidate.

        Args:
            values: the values [parameters].
            **where: start and step, or generation, for the trace.
        """
        if self.count >= self._budget:
            raise AssertionError("the budget is used up")
        self.count += 1
        request = {"event": "evaluation", **where, "values": values.tolist()}
        event = self._trace.record(request, lambda: self._evaluate(values))
        if self.best is None or event["score"] >= self.best["score"]:
            self.best = event
        self.on_evaluation(event)
        return event["score"]


def override_parameters(tunable: Tunable, overrides: Mapping[str, tuple[float, ...]]) -> Tunable:
    """Return a tunable with other starts and bounds.

    Args:
        tunable: the tunable.
        overrides: name of a parameter to (start,) or (start, low, high).

    Raises:
        UserError: an unknown name, or bounds that exclude the start.
    """
    names = [parameter.name for parameter in tunable.parameters]
    for name in overrides:
        if name not in names:
            raise UserError(
                f"{tunable.name}: no number {name!r} to tune; "
                f"{did_you_mean(name, names, 'available: ' + ', '.join(names))}"
            )
    parameters = []
    for parameter in tunable.parameters:
        new = overrides.get(parameter.name, ())
        changes: dict[str, Any] = dict(zip(("start", "low", "high"), new, strict=False))
        parameters.append(dataclasses.replace(parameter, **changes))
    return dataclasses.replace(tunable, parameters=tuple(parameters))
