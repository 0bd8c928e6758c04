"""A small run with all kinds of controls: budgets, interruptions and an extension."""

import dataclasses

import pytest

from sdjax.report.controls import control_rows
from sdjax.search import control_programs, control_search
from sdjax.search.comparison_config import ControlsConfig, RunTuningConfig
from sdjax.search.loop import run_search
from sdjax.search.ranking import controls, programs_of
from sdjax.search.score_types import Answer
from sdjax.search.store import Store
from sdjax.search.types import PURPOSES, RANDOM, SEARCH, UNTRAINED, Entry
from sdjax.tuning.search import SearchConfig

pytestmark = pytest.mark.slow


@pytest.fixture
def config(small_config):
    return dataclasses.replace(
        small_config,
        tuning=RunTuningConfig(programs=1, search=SearchConfig(budget=2, steps=2, batch=2)),
        controls=ControlsConfig(tuned=("weights", "ties"), max_evaluations=4),
        test=dataclasses.replace(small_config.test, ablations=0),
    )


def results(folder):
    with Store.open(folder) as store:
        samples = [
            (purpose, one.iteration, one.number, one.text, one.status, one.identity)
            for purpose in PURPOSES
            for one in store.judged(purpose=purpose)
        ]
        return samples, store.summaries(None, None), store.select(Answer)


def interrupt(patch, module, name, call):
    """Have a call of a function raise KeyboardInterrupt after its work."""
    function, calls = getattr(module, name), iter(range(100))

    def interrupted(*arguments, **options):
        result = function(*arguments, **options)
        if next(calls) == call:
            raise KeyboardInterrupt
        return result

    patch.setattr(module, name, interrupted)


def test_controls_stay_within_the_budget_and_resume(config, tmp_path, monkeypatch):
    folder = tmp_path / "whole"
    run_search(config, folder)
    with Store.open(folder) as store:
        rows = {row.title: row for row in control_rows(store, "strict")}
        search = rows["programs of the run"]
        for title in ("random programs", "programs of the untrained generator"):
            assert 0 < rows[title].problems <= search.problems
            assert rows[title].seconds > 0
        tuned = [row for row in rows.values() if ", tuned" in row.title]
        assert {row.title.partition(",")[0] for row in tuned} == {"weights", "ties"}
        for row in tuned:
            assert 24 <= row.problems <= min(4 * 24, search.problems)
            assert set(row.accuracies) >= {"development", "test"}
        assert programs_of(store, RANDOM) - programs_of(store, SEARCH)
        assert controls(store) >= programs_of(store, UNTRAINED)
        names = {e.detail.get("family") for e in store.by_key(Entry).values()} - {None}
        assert names == {"weights", "ties"}
    before = results(folder)
    run_search(config, folder)
    assert results(folder) == before

    again = tmp_path / "interrupted"
    for module, name, call in (
        (control_programs, "score_programs", 0),
        (control_search, "search_by_gradient", 0),
    ):
        with monkeypatch.context() as patch:
            interrupt(patch, module, name, call)
            with pytest.raises(KeyboardInterrupt):
                run_search(config, again)
    run_search(config, again)
    assert results(again) == before


def test_extended_run_gives_its_controls_more(config, tmp_path):
    config = dataclasses.replace(
        config,
        score="tuned",
        iterations=1,
        controls=ControlsConfig(tuned=("weights",), untrained=False),
    )
    run_search(config, tmp_path)
    with Store.open(tmp_path) as store:
        before = {row.title: row.problems for row in control_rows(store, "strict")}
    run_search(dataclasses.replace(config, iterations=2), tmp_path)
    with Store.open(tmp_path) as store:
        rows = {row.title: row for row in control_rows(store, "strict")}
        limit = rows["programs of the run"].problems
        assert limit > before["programs of the run"]
        assert before["random programs"] < rows["random programs"].problems <= limit
        budgets = [e.detail["budget"] for e in store.by_key(Entry).values() if "budget" in e.detail]
        assert max(budgets) == limit // 24
        (tuned,) = [row for title, row in rows.items() if "tuned (" in title]
        assert tuned.problems <= limit
