"""Style and file formats of all figures."""

from __future__ import annotations

import io
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK, SOFT, GRID = "#1f2933", "#6b7785", "#e3e7ec"
BLUE, ORANGE = "#0072B2", "#D55E00"  # of Okabe and Ito's color-blind safe palette

STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "text.color": INK,
    "text.parse_math": False,  # names may contain dollar signs
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "figure.facecolor": "white",
    "legend.frameon": False,
    "svg.fonttype": "path",  # independent of installed fonts
}
_REMOVED_METADATA = ("Creator", "Date", "Format", "Type")  # includes a timestamp and a URL


def svg(figure: Figure, name: str) -> str:
    """Return a figure as an <svg> element; equal figures give equal strings.

    Args:
        figure: figure to render.
        name: label for screen readers; also makes element ids unique within the page.
    """
    buffer = io.StringIO()
    with mpl.rc_context({**STYLE, "svg.hashsalt": name}):
        FigureCanvasSVG(figure).print_svg(buffer, metadata=dict.fromkeys(_REMOVED_METADATA))
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{name}"', 1)


def png(figure: Figure, dpi: int = 110) -> bytes:
    """Return a figure as PNG."""
    buffer = io.BytesIO()
    with mpl.rc_context(STYLE):
        figure.set_dpi(dpi)
        FigureCanvasAgg(figure).print_png(buffer)
    return buffer.getvalue()
