import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from sdjax.core.plot_style import png, svg
from sdjax.evaluation.statistics import Interval
from sdjax.report.data import IterationReport, ReferenceLine, read_report
from sdjax.report.plots import (
    development_against_test,
    gains,
    sample_shares,
    score_distributions,
)
from sdjax.report.results import TestRow


@pytest.fixture(scope="module")
def report(finished):
    return read_report(finished)


def test_figures_are_well_formed_and_deterministic(report):
    rows = report.tables["main"]
    draw_functions = {
        "scores": lambda: score_distributions(report.iterations, report.references, "strict"),
        "shares": lambda: sample_shares(report.iterations),
        "gains": lambda: gains(rows, "strict"),
        "against": lambda: development_against_test(rows, "strict"),
    }
    for name, draw in draw_functions.items():
        text = svg(draw(), name)
        assert ElementTree.fromstring(text).get("aria-label") == name
        assert text == svg(draw(), name)


def test_shares_sum_to_100_percent(report):
    (axes,) = sample_shares(report.iterations).axes
    for place in range(len(report.iterations)):
        bars = [p for p in axes.patches if round(p.get_y() + p.get_height() / 2) == place]
        assert sum(bar.get_width() for bar in bars) == pytest.approx(100)


def test_every_program_has_a_dot(report):
    (axes,) = score_distributions(report.iterations, report.references, "strict").axes
    dots = [c for c in axes.collections if len(c.get_offsets()) > 1]
    for one, drawn in zip(report.iterations, dots, strict=True):
        heights = np.sort(drawn.get_offsets()[:, 1])
        assert np.allclose(heights, np.sort(100 * np.array(one.scores)))


def iteration(**fields) -> IterationReport:
    return IterationReport(
        **{
            "iteration": 1,
            "temperature": None,
            "samples": 1,
            "counts": {"refused": 1},
            "reasons": {"refused": 1},
            "scores": (),
            "sample_mean": None,
            "unseen": None,
            "held_out": {},
            "training": {},
            **fields,
        }
    )


def test_minimal_data_can_be_plotted():
    single = iteration(scores=(0.5,), sample_mean=0.5)
    assert "<svg" in svg(score_distributions([single, iteration()], [], "strict"), "a")
    assert "<svg" in svg(sample_shares([iteration()]), "b")
    unbounded = Interval(mean=0.0, low=-np.inf, high=np.inf)
    row = TestRow(
        name="program:$x_{$",
        kind="program",
        development=None,
        problems=1,
        strict=Interval(mean=0.0, low=0.0, high=1.0),
        flexible=Interval(mean=0.0, low=0.0, high=1.0),
        strict_gain=unbounded,
        flexible_gain=unbounded,
        method_gain=None,
    )
    assert png(gains([row], "strict")).startswith(b"\x89PNG")
    assert "<svg" in svg(development_against_test([], "strict"), "c")


def test_labels_of_close_lines_are_moved_apart():
    lines = [ReferenceLine(name=f"line {n}", score=0.5 + n / 10_000) for n in range(5)]
    scored = iteration(scores=(0.2, 0.9), sample_mean=0.5)
    (axes,) = score_distributions([scored], lines, "strict").axes
    low, high = axes.get_ylim()
    places = sorted(text.xyann[1] for text in axes.texts)
    assert min(np.diff(places)) >= 0.04 * (high - low)
