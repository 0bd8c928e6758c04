"""The figures of the report, as SVG."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sdjax.core.plot_style import INK, SOFT, STYLE
from sdjax.report.data import IterationReport, ReferenceLine
from sdjax.report.results import TestRow, cut_middle, shown_metrics
from sdjax.report.selection import Selection
from sdjax.sandbox.verdict import ADMISSIBLE, ADMITTED, is_admissible

# Okabe and Ito's color-blind safe palette
COLORS = {
    "seed": "#000000",
    "expert": "#E69F00",
    "method": "#009E73",
    "control": "#CC79A7",
    "program": "#0072B2",
}
LINES = ("#000000", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9")
SHARES = ("#0072B2", "#8EC1E3")
REFUSED = ("#D55E00", "#E69F00", "#F0C75E", "#CC79A7", "#9B7FB8", "#B0B7BF", "#7D8791")


def score_distributions(
    iterations: Sequence[IterationReport], references: Sequence[ReferenceLine], metric: str
) -> Figure:
    """Plot the development scores of each iteration's distinct programs, with reference lines."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.6), layout="constrained")
        axes = figure.add_subplot()
        rng = np.random.default_rng(0)  # only for the jitter
        for place, iteration in enumerate(iterations, 1):
            scores = 100 * np.asarray(iteration.scores)
            if scores.size > 1:
                axes.boxplot(
                    [scores],
                    positions=[place],
                    widths=0.5,
                    showfliers=False,
                    patch_artist=True,
                    boxprops={"facecolor": "#d6e6f3", "edgecolor": COLORS["program"]},
                    medianprops={"color": COLORS["program"], "linewidth": 2},
                    whiskerprops={"color": COLORS["program"]},
                    capprops={"color": COLORS["program"]},
                    zorder=1.5,
                )
            jitter = rng.uniform(-0.18, 0.18, scores.size)
            axes.scatter(
                place + jitter,
                scores,
                s=14,
                color=COLORS["program"],
                alpha=0.6,
                linewidths=0,
                zorder=3,
            )
            if iteration.sample_mean is not None:
                axes.scatter(
                    [place + 0.34],
                    [100 * iteration.sample_mean],
                    marker="D",
                    s=42,
                    color="#D55E00",
                    zorder=4,
                    label="mean of all admissible samples" if place == 1 else None,
                )
        for color, reference in zip(LINES, references, strict=False):
            axes.axhline(
                100 * reference.score, color=color, linestyle=(0, (5, 3)), linewidth=1.4, zorder=2.5
            )
        _line_labels(axes, references)
        names = [
            f"iteration {iteration.iteration}\n{len(iteration.scores)} programs"
            + (f"\nT = {iteration.temperature:.2f}" if iteration.temperature is not None else "")
            for iteration in iterations
        ]
        axes.set_xticks(range(1, len(iterations) + 1), names)
        axes.set_xlim(0.4, len(iterations) + 0.6)
        axes.grid(visible=False, axis="x")
        axes.set_ylabel(f"development accuracy, {metric} (%)")
        if axes.get_legend_handles_labels()[0]:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1))
        return figure


def _line_labels(axes: Axes, references: Sequence[ReferenceLine]) -> None:
    """Label the reference lines at the right edge, shifting labels that would overlap."""
    low, high = axes.get_ylim()
    step = (high - low) * 0.05
    order = sorted(range(len(references)), key=lambda n: references[n].score)
    place = -np.inf
    for n in order:
        score = 100 * references[n].score
        place = max(score, place + step)
        axes.annotate(
            f"{references[n].name}  {score:.1f}",
            xy=(1.0, score),
            xytext=(1.02, place),
            xycoords=axes.get_yaxis_transform(),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            fontsize=9,
            color=LINES[n % len(LINES)],
            annotation_clip=False,
        )


def sample_shares(iterations: Sequence[IterationReport]) -> Figure:
    """Plot the fractions of novel, duplicate and inadmissible samples in each iteration."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.9 + 0.5 * len(iterations)), layout="constrained")
        axes = figure.add_subplot()
        reasons: dict[str, int] = {}
        for iteration in iterations:
            for status, count in iteration.counts.items():
                if not is_admissible(status):
                    reasons[status] = reasons.get(status, 0) + count
        statuses = [*ADMISSIBLE, *sorted(reasons, key=lambda s: (-reasons[s], s))]
        colors = [*SHARES, *(REFUSED[n % len(REFUSED)] for n in range(len(reasons)))]
        names = {ADMITTED: "novel (admitted)"}
        left = np.zeros(len(iterations))
        rows = np.arange(len(iterations))
        for status, color in zip(statuses, colors, strict=True):
            counts = np.array([iteration.counts.get(status, 0) for iteration in iterations])
            width = 100 * counts / np.array([iteration.samples for iteration in iterations])
            axes.barh(
                rows,
                width,
                left=left,
                height=0.62,
                color=color,
                edgecolor="white",
                label=names.get(status, status),
            )
            for row, (start, share) in enumerate(zip(left, width, strict=True)):
                if share >= 4:
                    ink = "white" if color in ("#0072B2", "#D55E00", "#7D8791") else INK
                    axes.text(
                        start + share / 2,
                        row,
                        f"{share:.0f}",
                        ha="center",
                        va="center",
                        color=ink,
                        fontsize=9,
                    )
            left += width
        axes.set_yticks(rows, [f"iteration {iteration.iteration}" for iteration in iterations])
        axes.invert_yaxis()
        axes.set_xlim(0, 100)
        axes.set_xlabel("fraction of samples (%)")
        axes.grid(visible=False)
        figure.legend(
            *axes.get_legend_handles_labels(), loc="outside upper left", ncols=4, fontsize=9
        )
        return figure


def gains(rows: Sequence[TestRow], metric: str) -> Figure:
    """Plot differences from the seed on the test problems, with 95% paired intervals."""
    metrics = shown_metrics(rows, metric)
    rows = [row for row in rows if row.strict_gain is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 1.3 + 0.42 * len(rows)), layout="constrained")
        axes = figure.add_subplot()
        for place, row in enumerate(rows):
            for number, name in enumerate(metrics):
                gain = row.gain(name)
                assert gain is not None
                shift = 0.26 * (number - (len(metrics) - 1) / 2)
                face = COLORS[row.kind] if number == 0 else "white"
                mean, low, high = (100 * x for x in (gain.mean, gain.low, gain.high))
                if np.isfinite([low, high]).all():
                    axes.plot([low, high], [place + shift] * 2, color=COLORS[row.kind], lw=1.6)
                axes.scatter(
                    [mean],
                    [place + shift],
                    s=34,
                    facecolors=face,
                    edgecolors=COLORS[row.kind],
                    zorder=3,
                )
        axes.axvline(0, color=COLORS["seed"], linewidth=1.2)
        axes.set_yticks(range(len(rows)), [cut_middle(row.title, 44) for row in rows])
        axes.set_ylim(len(rows) - 0.5, -0.5)
        axes.grid(visible=False, axis="y")
        legend = "   ● strict   ○ flexible" if len(metrics) > 1 else ""
        axes.set_xlabel(f"test accuracy minus the seed's (points){legend}")
        return figure


def development_against_test(rows: Sequence[TestRow], metric: str) -> Figure:
    """Plot test accuracy against development accuracy."""
    rows = [row for row in rows if row.development is not None]
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(6.2, 5.2), layout="constrained")
        axes = figure.add_subplot()
        seen: set[str] = set()
        for row in rows:
            accuracy = row.flexible if metric == "flexible" else row.strict
            assert row.development is not None
            axes.errorbar(
                [100 * row.development],
                [100 * accuracy.mean],
                yerr=[
                    [100 * (accuracy.mean - accuracy.low)],
                    [100 * (accuracy.high - accuracy.mean)],
                ],
                fmt="o",
                markersize=6,
                color=COLORS[row.kind],
                elinewidth=0.9,
                alpha=0.85,
                label=None if row.kind in seen else row.kind,
            )
            seen.add(row.kind)
        ends = [*axes.get_xlim(), *axes.get_ylim()]
        low, high = max(0, min(ends)), min(100, max(ends))
        axes.plot([low, high], [low, high], color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        axes.set_xlim(low, high)
        axes.set_ylim(low, high)
        axes.set_aspect("equal")
        axes.set_xlabel(f"development accuracy, {metric} (%)")
        axes.set_ylabel(f"test accuracy, {metric} (%)")
        if seen:
            axes.legend(loc="upper left", fontsize=9)
        return figure


def overestimates(selection: Selection) -> Figure:
    """Plot by how much the best program's development score is too high, by number of programs."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 4.2), layout="constrained")
        axes = figure.add_subplot()
        axes.axhline(0, color=SOFT, linewidth=1, linestyle=(0, (2, 2)))
        if selection.halves:
            counts = list(selection.halves)
            axes.plot(
                counts,
                [100 * selection.halves[n] for n in counts],
                color=COLORS["seed"],
                linewidth=1.6,
                label="one half of the development problems minus the other, random orders",
            )
        for name, color, shift in (
            ("confirmation", COLORS["method"], 0.97),
            ("test", COLORS["program"], 1.03),
        ):
            points = [
                (best.tried * shift, gain)
                for best in selection.bests
                if (gain := getattr(best, f"minus_{name}")) is not None
            ]
            if not points:
                continue
            axes.errorbar(
                [place for place, _ in points],
                [100 * gain.mean for _, gain in points],
                yerr=[
                    [100 * (gain.mean - gain.low) for _, gain in points],
                    [100 * (gain.high - gain.mean) for _, gain in points],
                ],
                fmt="o",
                markersize=5,
                elinewidth=0.9,
                color=color,
                label=f"development minus {name}, best program so far",
            )
        axes.set_xscale("log", base=2)
        ticks = [best.tried for best in selection.bests]
        axes.set_xticks(ticks, map(str, ticks))
        axes.minorticks_off()
        axes.set_xlabel("number of programs tried")
        axes.set_ylabel("difference (points)")
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), fontsize=9)
        return figure
