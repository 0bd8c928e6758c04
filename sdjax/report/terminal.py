"""The final table of a run for the terminal: one line per row, with the results of the page."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from sdjax.core.visible import visible
from sdjax.evaluation.statistics import Interval, percent
from sdjax.report.ablations import AblationTable
from sdjax.report.coevolution import base_chains
from sdjax.report.controls import ControlRow, shown_splits
from sdjax.report.data import read_report
from sdjax.report.results import TestRow, cut_middle, shown_metrics
from sdjax.search.entry_names import display_name
from sdjax.search.store import Store
from sdjax.search.types import MAIN

TABLE_WIDTH = 100  # of tables that are not printed on a terminal
COLUMN_GAP = 2
_MIN_NAME_WIDTH = 24
_SHORT = {"development": "dev.", "confirmation": "conf."}


def final_table(store: Store, setting: str = MAIN, *, width: int = TABLE_WIDTH) -> Group:
    """Return the final table of a setting with notes; that of the search after the run's answer.

    Args:
        store: the run's store.
        setting: name of the setting.
        width: number of characters per line. Longer names are cut in the middle; on a narrow
            terminal, the metric that is not the run's is shown without differences, or not at all.
    """
    report = read_report(store)
    rows = report.tables.get(setting, ())
    title = f"Test accuracy (%), setting {visible(setting)}"
    table, notes = rows_table(rows, report.metric, title=title, width=width)
    has_confirmation = any(row.confirmation is not None for row in rows)
    selected_by = "confirmation" if has_confirmation else "development"
    if any(row.tuned_from for row in rows):
        notes.insert(
            0, "(tuned ID): program ID with tuned numbers; the other programs are as written"
        )
    if any(row.is_answer for row in rows):
        notes.insert(
            0,
            f"* the run's best program, by {selected_by} score; "
            "`sdjax merge --run DIR --rank RANK OUT` writes it",
        )
    answer: Sequence[str] = ()
    if setting == MAIN:
        answer = () if report.answer is None else (visible(report.answer.sentence),)
        notes += report.missing
        notes += [f"bases by co-evolution: {visible(chain)}" for chain in base_chains(store)]
    else:
        best = f"the best method by {selected_by} score"
        notes += gain_notes(rows, report.best_method, best)
    shown: list[RenderableType] = [table, *map(Text, notes)]
    if setting == MAIN and report.controls:
        shown += [Text(), controls_table(report.controls, width=width)]
    if setting == MAIN and report.ablations:
        shown += [Text(), ablation_table(report.ablations[0], width=width)]
    return Group(*map(Text, answer), *shown)


def controls_table(rows: Sequence[ControlRow], *, width: int = TABLE_WIDTH) -> Table:
    """Return the table of the search and its controls: what each has spent and reached.

    Args:
        rows: the rows.
        width: number of characters per line. If all intervals do not fit, only those of the last
            split are shown.
    """
    splits = shown_splits(rows)
    for with_interval in (splits, splits[-1:]):
        headers = ["tuned", "problems", "device-s"]
        for split in splits:
            ending = " [95 %]" if split in with_interval else ""
            headers.append(f"{_SHORT.get(split, split)}{ending}")
        cells = [_control_cells(row, splits, with_interval) for row in rows]
        widths = [max(len(line[i]) for line in [headers, *cells]) for i in range(len(headers))]
        name_width = width - sum(one + COLUMN_GAP for one in widths)
        if name_width >= _MIN_NAME_WIDTH:
            break
    table = plain_table("Search and controls: tuned numbers, budgets, accuracy (%)")
    table.add_column(Text("best of"), no_wrap=True)
    for header in headers:
        table.add_column(Text(header), justify="right", no_wrap=True)
    for row, line in zip(rows, cells, strict=True):
        title = cut_middle(visible(row.title), max(name_width, _MIN_NAME_WIDTH))
        table.add_row(Text(title), *map(Text, line))
    return table


def _control_cells(
    row: ControlRow, splits: Sequence[str], with_interval: Sequence[str]
) -> list[str]:
    cells = [str(row.numbers), f"{row.problems:,}", f"{row.seconds:,.0f}"]
    for split in splits:
        accuracy = row.accuracies.get(split)
        if accuracy is not None and split in with_interval:
            cells.append(accuracy.in_percent())
        else:
            cells.append(percent(None if accuracy is None else accuracy.mean))
    return cells


def ablation_table(ablations: AblationTable, *, width: int = TABLE_WIDTH) -> Table:
    """Return the ablations of a program.

    Args:
        ablations: the ablations.
        width: as in `final_table`.
    """
    title = (
        f"Confirmation accuracy (%) of {display_name(ablations.program)}, {ablations.form}, "
        f"{percent(ablations.accuracy)}, with changes"
    )
    table = plain_table(visible(title))
    table.add_column(Text("change"), no_wrap=True)
    table.add_column(Text("conf."), justify="right", no_wrap=True)
    table.add_column(Text("minus the program [95 %]"), justify="right", no_wrap=True)
    for row in ablations.rows:
        difference = Text("refused") if row.refusal else gain_text(row.gain)
        name = cut_middle(visible(row.title), max(width - 36, _MIN_NAME_WIDTH))
        table.add_row(Text(name), Text(percent(row.accuracy)), difference)
    return table


def rows_table(
    rows: Sequence[TestRow], metric: str, *, title: str, width: int = TABLE_WIDTH
) -> tuple[Table, list[str]]:
    """Return a table of test results, and notes about its columns.

    Args:
        rows: the rows, in order.
        metric: the run's metric.
        title: text above the table.
        width: as in `final_table`.
    """
    table = plain_table(title)
    columns, name_width = _fitting_columns(rows, metric, width)
    for header, _ in columns:
        is_text = header in ("name", "tuned on")
        table.add_column(Text(header), justify="left" if is_text else "right", no_wrap=True)
    for number, row in enumerate(rows):
        cells = [cells[number] for _, cells in columns]
        cells[1] = Text(cut_middle(cells[1].plain, name_width))
        table.add_row(*cells, style="bold" if row.is_answer else None)
    notes = []
    if rows and len(shown_metrics(rows, metric)) == 1:
        notes.append("strict and flexible accuracy are equal in every row")
    elif rows and not any(header in ("flex.", "strict") for header, _ in columns):
        notes.append(f"{metric} accuracy; the report also has the other metric")
    return table, notes


def plain_table(title: str) -> Table:
    """Return an empty table without edges.

    Args:
        title: text above the table.
    """
    return Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAD,
        show_edge=False,
        padding=(0, COLUMN_GAP - 1, 0, 0),  # the box adds one more space
        pad_edge=False,
    )


def gain_notes(rows: Sequence[TestRow], method: str | None, description: str) -> list[str]:
    """Return a sentence about the gain of the best program over a human-designed method.

    Args:
        rows: the rows of the table.
        method: name of the method's entry.
        description: what the method is, such as "the best method by confirmation score".
    """
    answer = next((row for row in rows if row.is_answer), None)
    if answer is None or method is None:
        return []
    gain = answer.method_gain
    if gain is None:
        return []
    return [
        f"{visible(answer.title)} vs. {description}, {display_name(method)}: "
        f"{gain.in_percent(signed=True)} points"
    ]


def _fitting_columns(
    rows: Sequence[TestRow], metric: str, width: int
) -> tuple[list[tuple[str, list[Text]]], int]:
    """Return (header, cells) of each column, and the width that is left for names."""
    metrics = shown_metrics(rows, metric)
    names = [visible(row.title) for row in rows]
    longest = max(map(len, names), default=0)
    # A tuned program's name is not cut, since it says which program was tuned.
    needed = max([_MIN_NAME_WIDTH, *(len(row.title) for row in rows if row.tuned_from)])
    layouts = [(metrics, metrics), (metrics, (metric,)), ((metric,),) * 2]
    for accuracies, gains in layouts:
        columns: list[tuple[str, list[Text]]] = [
            ("rank", [Text(_rank(row)) for row in rows]),
            ("name", [Text(name) for name in names]),
            ("dev.", [Text(percent(row.development)) for row in rows]),
        ]
        if any(row.confirmation is not None for row in rows):
            columns.append(("conf.", [Text(percent(row.confirmation)) for row in rows]))
        if any(row.tuned_on for row in rows):
            columns.insert(2, ("tuned on", [Text(row.tuned_on) for row in rows]))
        for name in accuracies:
            short = "test" if len(accuracies) == 1 else {"flexible": "flex."}.get(name, name)
            columns.append((short, [Text(percent(row.accuracy(name).mean)) for row in rows]))
            if name in gains:
                columns.append(("vs. seed [95 %]", [gain_text(row.gain(name)) for row in rows]))
        others = (c for c in columns if c[0] != "name")
        taken = sum(
            max([len(header), *(len(cell) for cell in cells)]) + COLUMN_GAP
            for header, cells in others
        )
        if width - taken >= min(longest, needed):
            break
    return columns, max(width - taken, 8)


def _rank(row: TestRow) -> str:
    return "" if row.rank is None else f"{'* ' if row.is_answer else ''}{row.rank}"


def gain_text(gain: Interval | None) -> Text:
    """Return a difference in points with its interval, in color if the interval excludes zero."""
    if gain is None:
        return Text("–")
    style = "green" if gain.low > 0 else "red" if gain.high < 0 else ""
    return Text(gain.in_percent(signed=True), style=style)
