"""The table of controls: what the search and each control have spent and reached."""

import random

import pytest

from sdjax.report.controls import control_rows, shown_splits
from sdjax.report.data import read_report
from sdjax.report.page import render
from sdjax.report.terminal import final_table
from sdjax.search.store import Store
from sdjax.search.types import Entry, Sample, StoredVerdict


@pytest.fixture
def run(finished, tmp_path):
    """The finished run with a random control, which finds one of its programs, and tuned ones."""
    with Store.mirror(tmp_path, finished.content()) as store:
        identity = store.judged(2)[3].identity
        source = next(v.source for v in store.select(StoredVerdict) if v.identity == identity)
        sample = Sample(
            purpose="random",
            iteration=1,
            number=0,
            prompt=store.judged(1)[0].prompt,
            text=source,
            tokens=(),
            stopped=True,
            source=source,
        )
        store.save(sample)
        store.save_phase(1, "score random", 3.0)
        yield store


def tuned(budget, evaluations):
    return {
        "family": "weights",
        "constants": 3,
        "values": [0.1, 0.2, 0.3],
        "grids": ["tuned"],
        "optimizer": "gradient",
        "budget": budget,
        "evaluations": evaluations,
        "problems": 200 * evaluations,
        "seconds": 12.5,
    }


def test_each_row_has_its_budget_and_best_merge(run, made_up):
    rng = random.Random(3)
    entries = {
        "method:weights, tuned": tuned(9, 7),
        "method:weights, tuned (20 evaluations)": tuned(20, 20),  # of the extended run
    }
    for name, detail in entries.items():
        run.save(Entry(name=name, kind="method", detail=detail))
        for split, count in (("development", 200), ("test", 400)):
            run.save_scores(name, split, made_up.outcomes(rng, 0.6, count))
    rows = {row.title: row for row in control_rows(run, "strict")}
    assert list(rows) == [
        "programs of the run",
        "random programs",
        "weights, tuned (20 evaluations)",
        "paper grid of methods",
        "fine grid of methods",
    ]
    search, shared = rows["programs of the run"], rows["random programs"]
    report = read_report(run)
    assert search.entry == report.best[0].name
    assert search.problems == 200 * sum(iteration.novel for iteration in report.iterations)
    assert search.seconds == 3 * (12.5 + 40.25)
    assert (shared.problems, shared.seconds) == (200, 3.0)
    assert shared.entry == f"program:{run.judged(2)[3].identity}"
    control = rows["weights, tuned (20 evaluations)"]
    assert (control.numbers, control.problems, control.seconds) == (3, 4000, 12.5)
    assert control.note == "gradient; used all of 20 evaluations"
    assert rows["fine grid of methods"].problems == 600
    assert shown_splits(list(rows.values())) == ["development", "test"]
    assert set(control.accuracies) == {"development", "test"}
    page = render(run)
    for row in rows.values():
        assert row.title in page


def test_control_that_ended_early_says_so(run, made_up):
    run.save(Entry(name="method:weights, tuned", kind="method", detail=tuned(9, 7)))
    (row,) = [row for row in control_rows(run, "strict") if row.numbers == 3]
    assert row.note == "gradient; ended after 7 of 9 evaluations"
    assert row.accuracies == {}


def test_damaged_details_are_no_error(run):
    broken = tuned(1, 1)
    broken |= {"budget": "many", "evaluations": None, "problems": {}, "seconds": []}
    broken |= {"constants": "3", "optimizer": None}
    run.save(Entry(name="method:weights, tuned", kind="method", detail=broken))
    run.save(Entry(name="method:other", kind="method", detail={"family": ["x"], "grids": 3}))
    assert {row.problems for row in control_rows(run, "strict") if "tuned" in row.title} == {0}
    final_table(run)
