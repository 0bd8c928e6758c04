"""The report of a run as one self-contained HTML page, and its final table for the terminal.

Programs, messages and names are untrusted: the template escapes all text, the page's content
security policy forbids scripts and requests, and characters that would reorder or hide text are
shown as codes.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import jinja2
from rich import box
from rich.table import Table
from rich.text import Text

from sdjax.evaluation.statistics import Interval
from sdjax.io.atomic_write import write_file
from sdjax.report.data import ReportData, TestRow, display_name, read_report
from sdjax.report.plots import (
    development_against_test,
    gains,
    sample_shares,
    score_distributions,
    svg,
)
from sdjax.search.store import Store
from sdjax.search.types import MAIN, Checkpoint, Lineage, Setting

TEMPLATE = Path(__file__).with_name("report.html")
MAX_LENGTH = 20_000  # longer strings are truncated to this many characters


def write_report(store: Store, out_path: Path) -> Path:
    """Write the page of a finished or unfinished run atomically; return its path."""
    out_path = Path(out_path)
    write_file(out_path, render(store))
    return out_path


def render(store: Store) -> str:
    """Return the page as HTML."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # not Markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    run = store.run()
    report = read_report(store)
    return template.render(
        name=run.config.get("name", "sdjax run"),
        run=run,
        report=report,
        settings=store.select(Setting),
        lineage=store.select(Lineage),
        phases=store.phases(),
        checkpoints=store.select(Checkpoint),
        reasons=_reasons(report),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
        display_name=display_name,
        median=median,
        **_figures(report),
    )


def final_table(store: Store, setting: str = MAIN) -> Table:
    """Return the final table of a setting; its caption lists missing results."""
    report = read_report(store)
    table = Table(
        title=Text(f"Test accuracy (%), setting {setting}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("", overflow="fold", min_width=17)
    for name in (
        f"dev.\n{report.metric}",
        "test\nstrict",
        "vs. seed\n[95 %]",
        "test\nflex.",
        "vs. seed\n[95 %]",
    ):
        table.add_column(Text(name), justify="right", no_wrap=True)
    rows = report.tables.get(setting, ())
    for row in rows:
        table.add_row(*_cells(row))
    notes = [*_gain_over_method(report, rows), *report.missing]
    if notes:
        table.caption = Text("\n".join(notes))
        table.caption_justify = "left"
    return table


def visible(text: str) -> str:
    """Return the text with control characters and bidirectional marks replaced by codes."""
    shown = "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else _code(c)
        for c in text[:MAX_LENGTH]
    )
    return shown if len(text) <= MAX_LENGTH else f"{shown}\n… ({len(text)} characters in total)"


def _gain_over_method(report: ReportData, rows: Sequence[TestRow]) -> list[str]:
    """Return a sentence about the gain of the best program over the best human-designed method."""
    best = report.best[0].name if report.best else None
    gain = next((row.method_gain for row in rows if row.name == best), None)
    if gain is None or best is None or report.best_method is None:
        return []
    mean, low, high = (100 * x for x in (gain.mean, gain.low, gain.high))
    return [
        f"The best program, {display_name(best)}, vs. {display_name(report.best_method)}: "
        f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}] {report.metric}"
    ]


def _code(character: str) -> str:
    return f"\\u{{{ord(character):04x}}}"


def _figures(report: ReportData) -> dict:
    rows = report.tables.get(MAIN, ())
    iterations, metric = report.iterations, report.metric
    scored = any(iteration.scores for iteration in iterations)
    compared = [row for row in rows if row.development is not None]
    return {
        "distributions": svg(
            score_distributions(iterations, report.references, metric),
            "scores of programs by iteration",
        )
        if scored
        else None,
        "shares": svg(sample_shares(iterations), "status of the samples") if iterations else None,
        "against": svg(development_against_test(compared, metric), "development vs. test")
        if compared
        else None,
        "gain_figures": {
            setting: svg(gains(table), f"differences from the seed {number}")
            if any(row.strict_gain for row in table)
            else None
            for number, (setting, table) in enumerate(report.tables.items())
        },
    }


def _reasons(report: ReportData) -> list[str]:
    """Return the reasons for inadmissible samples, most frequent first."""
    total: dict[str, int] = {}
    for iteration in report.iterations:
        for reason, count in iteration.reasons.items():
            total[reason] = total.get(reason, 0) + count
    return sorted(total, key=lambda reason: (-total[reason], reason))


def _cells(row: TestRow) -> list[Text]:
    return [
        Text(visible(display_name(row.name))),
        Text("–" if row.development is None else f"{100 * row.development:.1f}"),
        Text(f"{100 * row.strict.mean:.1f}"),
        _gain(row.strict_gain),
        Text(f"{100 * row.flexible.mean:.1f}"),
        _gain(row.flexible_gain),
    ]


def _gain(gain: Interval | None) -> Text:
    if gain is None:
        return Text("–")
    style = "green" if gain.low > 0 else "red" if gain.high < 0 else ""
    mean, low, high = (100 * x for x in (gain.mean, gain.low, gain.high))
    # On two lines, so that both metrics fit into 80 columns.
    return Text(f"{mean:+.1f}\n[{low:+.1f}, {high:+.1f}]", style=style)
