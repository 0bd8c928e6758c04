"""The report of a run as one self-contained HTML page.

Programs, messages and names are untrusted: the template escapes all text, the page's content
security policy forbids scripts and requests, and characters that would reorder or hide text are
shown as codes.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import jinja2

from sdjax.core.plot_style import svg
from sdjax.core.visible import visible
from sdjax.evaluation.statistics import percent
from sdjax.io.atomic_write import write_file
from sdjax.report.coevolution import base_chains, iteration_bases, promotion_rows
from sdjax.report.controls import shown_splits
from sdjax.report.data import ReportData, read_report
from sdjax.report.plots import (
    development_against_test,
    gains,
    overestimates,
    sample_shares,
    score_distributions,
)
from sdjax.report.results import shown_metrics
from sdjax.search.answer import control_title
from sdjax.search.entry_names import display_name
from sdjax.search.ranking import tuned_from
from sdjax.search.store import Store
from sdjax.search.types import MAIN, Change, Checkpoint, Entry, Lineage, RunInput, Setting

TEMPLATE = Path(__file__).with_name("report.html")


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
    environment.globals["points"] = percent
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    run, entries = store.run(), store.by_key(Entry)

    def entry_title(name: str) -> str:
        return display_name(name, tuned_from(entries[name]))

    report = read_report(store)
    return template.render(
        name=str(run.config.get("name", "sdjax run")),
        run=run,
        report=report,
        settings=store.select(Setting),
        lineage=store.select(Lineage),
        iteration_bases=iteration_bases(store),
        base_chains=base_chains(store),
        promotions=promotion_rows(store),
        phases=store.phases(),
        checkpoints=store.select(Checkpoint),
        inputs=store.select(RunInput),
        changes=store.select(Change),
        reasons=_reasons(report),
        config=json.dumps(run.config, indent=2, ensure_ascii=False),
        entry_title=entry_title,
        control_titles={
            one.control: control_title(store, one.control) for one in report.comparisons
        },
        shown_metrics=shown_metrics,
        shown_splits=shown_splits(report.controls),
        median=median,
        **_figures(report),
    )


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
        "overestimates": svg(overestimates(report.selection), "development minus test")
        if report.selection.bests
        else None,
        "gain_figures": {
            setting: svg(gains(table, metric), f"differences from the seed {number}")
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
