"""The figure of the comparison: what each arm has found, over the budget."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.figure import Figure

from benchmarks.learning.arm_settings import CONTROLS
from benchmarks.learning.arm_table import Rows
from sdjax.core.plot_style import STYLE, svg
from sdjax.io.atomic_write import write_file

_PANELS = {"best": "best so far", "top mean": "mean of the top 10"}


def draw(rows: Rows, path: Path) -> None:
    """Draw the best score and the mean of the ten best over the budget, and write it as SVG.

    Lines are means over the seeds, bands the range of the seeds.

    Args:
        rows: the rows of arms; those of the controls are not shown.
        path: path of the figure.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4.2), layout="constrained")
        for axes, (key, title) in zip(figure.subplots(1, 2), _PANELS.items(), strict=True):
            for name, by_seed in rows.items():
                if name == CONTROLS:
                    continue
                curves = [row["curve"] for row in by_seed.values()]
                problems = [point["problems"] for point in curves[0]]
                values = 100 * np.array([[point[key] for point in curve] for curve in curves])
                (line,) = axes.plot(problems, values.mean(axis=0), linewidth=1.6, label=name)
                axes.fill_between(
                    *(problems, values.min(axis=0), values.max(axis=0)),
                    color=line.get_color(),
                    alpha=0.12,
                    linewidth=0,
                )
            axes.set_title(f"{title}, development", loc="left")
            axes.set_xlabel("evaluated problems")
            axes.set_ylabel("solved (%)")
            axes.set_ylim(bottom=40)
            axes.legend(loc="lower right")
        write_file(path, svg(figure, "found over the budget, by arm") + "\n")
