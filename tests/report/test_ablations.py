"""Ablations in the report, on the page and in the terminal."""

import random

import pytest
from rich.console import Console

from sdjax.evaluation.statistics import paired_by_key
from sdjax.report.ablations import read_ablations
from sdjax.report.page import render
from sdjax.report.terminal import final_table
from sdjax.search.score_types import Application
from sdjax.search.types import Entry, Program, program_entry


@pytest.fixture
def run(made_up, tmp_path):
    """Return a store with a tuned program, the program it comes from, and three ablations."""
    rng = random.Random(0)
    with made_up.new_store(tmp_path) as store:
        made_up.add_baselines(store, rng)
        for identity, detail in (("a1", {}), ("b2", {"tuned_from": "a1", "constants": 2})):
            name = program_entry(identity)
            store.save(Program(identity=identity, source="# source"))
            store.save(Entry(name=name, kind="program", identity=identity, detail=detail))
            for split in ("development", "confirmation", "test"):
                skill = 0.8 if identity == "b2" else 0.6
                store.save_scores(name, split, made_up.outcomes(rng, skill, 300))
        for title in ("scaled by 0.5", f"without {made_up.hostile}", "all tensors merged"):
            name = f"ablation:b2:{title}"
            store.save(Entry(name=name, kind="ablation", detail={"program": "program:b2"}))
            if title.startswith("all"):
                refused = Application(
                    entry=name, verdict="refused", message="no such tensor", change=0
                )
                store.save(refused)
            else:
                store.save_scores(name, "confirmation", made_up.outcomes(rng, 0.5, 300))
        yield store


def test_ablations_are_paired_with_their_program(run, made_up):
    (table,) = read_ablations(run, "strict")
    assert (table.program, table.form, table.problems) == ("program:b2", "as tuned", 300)
    written, scaled, _, scope = table.rows
    assert written.title == "as written"
    assert scaled.title == "scaled by 0.5"
    correct, own = (
        {o.problem_id: o.strict for o in run.outcomes(name, "confirmation")}
        for name in ("ablation:b2:scaled by 0.5", "program:b2")
    )
    assert scaled.gain == paired_by_key(correct, own)
    assert (scope.accuracy, scope.gain, scope.refusal) == (None, None, "no such tensor")
    page = render(run)
    assert "no such tensor" in page
    assert "scaled by 0.5" in page
    assert made_up.hostile not in page
    console = Console(width=100)
    with console.capture() as capture:
        console.print(final_table(run))
    text = capture.get()
    assert "Confirmation accuracy (%) of program b2, as tuned" in text
    (line,) = [line for line in text.splitlines() if line.startswith("scaled by 0.5")]
    assert scaled.gain.in_percent(signed=True) in line
    assert "refused" in text
    assert "\u202e" not in text


def test_unfinished_ablation_has_no_difference(run):
    run.save(Entry(name="ablation:b2:later", kind="ablation", detail={"program": "program:b2"}))
    (table,) = read_ablations(run, "strict")
    assert (table.rows[-1].title, table.rows[-1].gain) == ("later", None)
    assert read_ablations(run, "flexible")[0].rows[1].gain is not None


def test_tables_fit_into_the_terminal(run):
    for width in (80, 100, 160):
        console = Console(width=width)
        with console.capture() as capture:
            console.print(final_table(run, width=width))
        assert "…" not in capture.get().split("Search and controls")[1].split("Confirmation")[0]
