"""The result of a search, and the files that it writes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdjax.core.progress import format_duration
from sdjax.evaluation.statistics import Interval, accuracy_interval, paired_difference
from sdjax.io.atomic_write import write_file
from sdjax.tuning.trace import TRACE
from sdjax.tuning.types import Parameter

RESULT, PLOT, TUNED = "result.json", "tuning", "tuned"


@dataclass(frozen=True, kw_only=True)
class Tuning:
    """Result of a search.

    Attributes:
        name: what was tuned.
        optimizers: "gradient", "cmaes", or both in this order.
        metric: "strict" or "flexible".
        parameters: the numbers, with their initial values and bounds.
        values: the tuned numbers, in the same order.
        text: the tuned program or recipe.
        suffix: ".py" or ".yaml".
        development: development score of the tuned merge, by which it was chosen. The second half
            of the development problems is not part of it.
        untuned: accuracy of the initial values on the second half.
        tuned: accuracy of the tuned values on the second half.
        gain: the difference of the two, paired by problem.
        evaluations: number of development evaluations.
        steps: number of gradient steps, without those that were dropped.
        dropped_steps: number of steps whose gradient was not finite.
        max_steps: number of gradient steps if no start had ended early.
        seconds: total time of all computations, over all processes of a resumed search.
        notes: remarks, such as why CMA-ES replaced the gradient.
        trace: all events of the search.
    """

    name: str
    optimizers: tuple[str, ...]
    metric: str
    parameters: tuple[Parameter, ...]
    values: tuple[float, ...]
    text: str
    suffix: str
    development: float
    untuned: Interval
    tuned: Interval
    gain: Interval
    evaluations: int
    steps: int
    dropped_steps: int
    max_steps: int
    seconds: float
    notes: tuple[str, ...]
    trace: tuple[Mapping[str, Any], ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files with the tuned program or recipe, the plot and the trace."""
        return (f"{TUNED}{self.suffix}", f"{PLOT}.svg", f"{PLOT}.png", TRACE)

    def summary(self) -> str:
        """Return the result in a few lines."""
        starts = [parameter.start for parameter in self.parameters]
        names = [parameter.name for parameter in self.parameters]
        width = max(map(len, names))
        numbers = [
            f"  {name:<{width}}  {start:>10.6g} -> {value:.6g}"
            for name, start, value in zip(names, starts, self.values, strict=True)
        ]
        gradient = f", {_counted(self.steps, 'gradient step')}" if self.max_steps else ""
        taken = self.steps + self.dropped_steps
        if taken < self.max_steps:
            gradient += f", stopped early after {taken} of {self.max_steps} steps"
        dropped = f" ({self.dropped_steps} more dropped: not finite)" if self.dropped_steps else ""
        how = " and ".join(_NAMES[name] for name in self.optimizers)
        return "\n".join(
            [
                f"{self.name}: {_counted(len(self.parameters), 'number')} tuned by {how}, "
                f"{_counted(self.evaluations, 'development evaluation')}{gradient}{dropped}, "
                f"{format_duration(self.seconds)}",
                *numbers,
                f"development problems not used for tuning, {self.metric} accuracy in %, 95% "
                "intervals",
                f"  untuned  {self.untuned.in_percent()}",
                f"  tuned    {self.tuned.in_percent()}",
                f"  gain     {self.gain.in_percent(signed=True)}, paired by problem",
                *self.notes,
            ]
        )


_NAMES = {"gradient": "gradient", "cmaes": "CMA-ES"}


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def paired_results(
    untuned: Mapping[str, Any], tuned: Mapping[str, Any], metric: str
) -> dict[str, Interval]:
    """Return the intervals of two evaluations of the same problems."""
    first, second = ([digit == "1" for digit in event[metric]] for event in (untuned, tuned))
    return {
        "untuned": accuracy_interval(first),
        "tuned": accuracy_interval(second),
        "gain": paired_difference(second, first),
    }


def write_result(folder: Path, result: Tuning) -> None:
    """Write the tuned program or recipe, the plot and the result.

    Args:
        folder: the folder of the trace.
        result: the result.
    """
    from sdjax.tuning.plot import search_plot  # matplotlib takes a second to import

    files: list[tuple[str, str | bytes]] = [(f"{TUNED}{result.suffix}", result.text)]
    files += [(f"{PLOT}.{kind}", content) for kind, content in search_plot(result).items()]
    files.append((RESULT, json.dumps(_to_json(result), indent=2) + "\n"))
    for name, content in files:
        write_file(folder / name, content)


def _to_json(result: Tuning) -> dict[str, Any]:
    intervals = {name: vars(getattr(result, name)) for name in ("untuned", "tuned", "gain")}
    fields = ("name", "optimizers", "metric", "development", "evaluations", "steps")
    return {
        **{name: getattr(result, name) for name in fields},
        "dropped_steps": result.dropped_steps,
        "max_steps": result.max_steps,
        "seconds": round(result.seconds, 1),
        "parameters": [
            vars(parameter) | {"tuned": value}
            for parameter, value in zip(result.parameters, result.values, strict=True)
        ],
        **intervals,
        "notes": list(result.notes),
    }


def steps_of(events: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """Return the number of gradient steps, and of those that were dropped."""
    steps = [event for event in events if event["event"] == "step"]
    dropped = sum(event["gradient"] is None for event in steps)
    return len(steps) - dropped, dropped
