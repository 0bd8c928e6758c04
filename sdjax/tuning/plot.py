"""Figure of a search: development scores, and the loss of a search by gradient."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from sdjax.core.plot_style import BLUE, ORANGE, SOFT, STYLE, png, svg

if TYPE_CHECKING:
    from sdjax.tuning.results import Tuning


def search_plot(result: Tuning) -> dict[str, str | bytes]:
    """Return the figure of a search as "svg" and "png".

    The upper panel has the score of every development evaluation and the best so far. If steps by
    gradient were made, a second panel has their loss on the training problems.
    """
    evaluations = [event for event in result.trace if event["event"] == "evaluation"]
    steps = [event for event in result.trace if event["event"] == "step"]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(8, 6.2 if steps else 3.8), layout="constrained")
        panels = figure.subplots(2 if steps else 1, 1, squeeze=False)[:, 0]
        _plot_scores(panels[0], evaluations, [p.start for p in result.parameters])
        panels[0].set_ylabel(f"development accuracy, {result.metric} (%)")
        panels[0].set_title(result.name, loc="left")
        if steps:
            _plot_losses(panels[1], steps)
        title = f"search over {result.name}"
        return {"svg": svg(figure, title) + "\n", "png": png(figure)}


def _plot_scores(
    axes: Axes, evaluations: Sequence[Mapping[str, Any]], start: Sequence[float]
) -> None:
    scores = 100 * np.array([event["score"] for event in evaluations])
    numbers = np.arange(1, len(scores) + 1)
    axes.scatter(numbers, scores, s=18, color=BLUE, alpha=0.7, linewidths=0, label="candidate")
    best = np.maximum.accumulate(scores)
    axes.step(numbers, best, where="post", color=ORANGE, linewidth=1.6, label="best so far")
    if np.allclose(evaluations[0]["values"], start, rtol=1e-5):
        axes.axhline(scores[0], color=SOFT, linestyle=(0, (5, 3)), linewidth=1.2, label="untuned")
    axes.set_xlabel("evaluation")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower right")


def _plot_losses(axes: Axes, steps: Sequence[Mapping[str, Any]]) -> None:
    losses = [np.nan if event["loss"] is None else event["loss"] for event in steps]
    axes.plot(np.arange(1, len(losses) + 1), losses, color=BLUE, linewidth=1.2)
    axes.set_xlabel("gradient step, all starts")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylabel("loss on training problems")
