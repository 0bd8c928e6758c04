"""One self-contained report.html of a run, and its final table for the terminal.

Programs, verdicts' messages and names are a language model's or a stranger's text: the template
escapes everything, the page's own policy forbids scripts and any request, and characters that
would reorder or hide text are shown as their codes.
"""

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
from sdjax.report.data import ReportData, Row, display_name, read_contents
from sdjax.report.plots import (
    development_against_test,
    gains,
    sample_shares,
    score_distributions,
    svg,
)
from sdjax.search.store import Store
from sdjax.search.types import MAIN

TEMPLATE = Path(__file__).with_name("report.html")
LONGEST = 20_000  # characters of a program that are shown


def write_report(store: Store, out_path: Path) -> Path:
    """Writes the page, atomically, from whatever the store holds; returns its path."""
    out_path = Path(out_path)
    write_file(out_path, render(store))
    return out_path


def render(store: Store) -> str:
    """The page as text."""
    environment = jinja2.Environment(
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,  # not Markup
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    run = store.run()
    contents = read_contents(store)
    return template.render(
        name=run.config.get("name", "a run of sdjax"),
        run=run,
        contents=contents,
        settings=store.settings(),
        lineage=store.lineage(),
        phases=store.phases(),
        checkpoints=store.checkpoints(),
        reasons=_reasons(contents),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
        display_name=display_name,
        median=median,
        **_figures(contents),
    )


def final_table(store: Store, setting: str = MAIN) -> Table:
    """The final table of a setting for the terminal; its caption says what is missing."""
    contents = read_contents(store)
    table = Table(
        title=Text(f"Test accuracy (%), setting {setting}"),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("", overflow="fold", min_width=17)
    for name in (
        f"dev.\n{contents.metric}",
        "test\nstrict",
        "above seed\n[95 %]",
        "test\nflex.",
        "above seed\n[95 %]",
    ):
        table.add_column(Text(name), justify="right", no_wrap=True)
    rows = contents.tables.get(setting, ())
    for row in rows:
        table.add_row(*_cells(row))
    notes = [*_against_method(contents, rows), *contents.missing]
    if notes:
        table.caption = Text("\n".join(notes))
        table.caption_justify = "left"
    return table


def visible(text: str) -> str:
    """The text with characters that hide or reorder others (controls, bidi marks) as codes."""
    shown = "".join(
        c if c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cf", "Cs", "Co") else _code(c)
        for c in text[:LONGEST]
    )
    return shown if len(text) <= LONGEST else f"{shown}\n… ({len(text)} characters in all)"


def _against_method(contents: ReportData, rows: Sequence[Row]) -> list[str]:
    """What the run's answer gains over the best human-designed method, in a sentence."""
    answer = contents.best[0].name if contents.best else None
    gain = next((row.method_gain for row in rows if row.name == answer), None)
    if gain is None or answer is None or contents.best_method is None:
        return []
    mean, low, high = (100 * x for x in (gain.mean, gain.low, gain.high))
    return [
        f"The answer, {display_name(answer)}, against {display_name(contents.best_method)}: "
        f"{mean:+.1f} points [{low:+.1f}, {high:+.1f}] {contents.metric}"
    ]


def _code(character: str) -> str:
    return f"\\u{{{ord(character):04x}}}"


def _figures(contents: ReportData) -> dict:
    rows = contents.tables.get(MAIN, ())
    iterations, metric = contents.iterations, contents.metric
    scored = any(one.scores for one in iterations)
    compared = [row for row in rows if row.development is not None]
    return {
        "distributions": svg(
            score_distributions(iterations, contents.levels, metric),
            "scores of programs by iteration",
        )
        if scored
        else None,
        "shares": svg(sample_shares(iterations), "what became of the samples")
        if iterations
        else None,
        "against": svg(development_against_test(compared, metric), "development against test")
        if compared
        else None,
        "gain_figures": {
            setting: svg(gains(table), f"differences from the seed {number}")
            if any(row.strict_gain for row in table)
            else None
            for number, (setting, table) in enumerate(contents.tables.items())
        },
    }


def _reasons(contents: ReportData) -> list[str]:
    """All reasons for which samples were dropped, the most frequent first."""
    total: dict[str, int] = {}
    for one in contents.iterations:
        for reason, count in one.reasons.items():
            total[reason] = total.get(reason, 0) + count
    return sorted(total, key=lambda reason: (-total[reason], reason))


def _cells(row: Row) -> list[Text]:
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
    # Two lines: both readings then fit into a terminal of 80 columns.
    return Text(f"{mean:+.1f}\n[{low:+.1f}, {high:+.1f}]", style=style)
