"""Trace of a search: resumption after a kill at any line, and traces that do not fit."""

import json

import pytest

from sdjax.core.errors import UserError
from sdjax.tuning.evolution import search_by_evolution
from sdjax.tuning.gradient import search_by_gradient
from sdjax.tuning.search import SearchConfig
from sdjax.tuning.trace import Trace
from tests.tuning.searches import Objective, tunable

SETTINGS = {"task": "arithmetic"}


def run(folder, optimizer, **options):
    """Search, and return (what was computed, events without times, best)."""
    config, objective = SearchConfig(budget=5, steps=6, evaluate_every=2, starts=2), Objective()
    with Trace(folder, SETTINGS, **options) as trace:
        evaluations = objective.evaluations(config, trace)
        if optimizer == "gradient":
            loss = objective.loss_and_gradient
            search_by_gradient(tunable(), loss, evaluations, config, trace)
        else:
            search_by_evolution(tunable(), evaluations, config)
    events = [{k: v for k, v in event.items() if k != "seconds"} for event in trace.events]
    return objective.evaluated + objective.stepped, events, evaluations.best["values"]


@pytest.mark.parametrize("optimizer", ["gradient", "cmaes"])
def test_search_killed_at_any_line_has_the_same_result(optimizer, tmp_path):
    computed, events, best = run(tmp_path / "whole", optimizer)
    lines = (tmp_path / "whole" / "trace.jsonl").read_text().splitlines(keepends=True)
    assert len(lines) == len(events) == computed
    for kept in range(len(lines) + 1):
        folder = tmp_path / str(kept)
        with Trace(folder, SETTINGS):
            pass
        torn = "" if kept == len(lines) else lines[kept][: len(lines[kept]) // 2]
        (folder / "trace.jsonl").write_text("".join(lines[:kept]) + torn)
        assert run(folder, optimizer) == (computed - kept, events, best)
        stored = [json.loads(line) for line in (folder / "trace.jsonl").read_text().splitlines()]
        assert [{k: v for k, v in e.items() if k != "seconds"} for e in stored] == events


def test_trace_is_read_and_written_exactly(tmp_path):
    gradient = [0.1 + 0.2, 1e-310]
    with Trace(tmp_path / "out", SETTINGS) as trace:
        trace.record({"event": "step"}, lambda: {"gradient": gradient})
    with Trace(tmp_path / "out", SETTINGS) as trace:
        assert trace.count_stored("step") == 1
        event = trace.record({"event": "step"}, pytest.fail)
        assert event["gradient"] == gradient
        assert trace.is_replayed
        assert trace.seconds == event["seconds"]


def test_other_settings_events_or_versions_raise_user_error(tmp_path):
    folder = tmp_path / "out"
    run(folder, "gradient", versions={"jax": "1"})
    with pytest.raises(UserError, match="out: contains a search of sdjax tune with"):
        Trace(folder, {"task": "gsm8k"})
    with pytest.raises(UserError, match=r"trace.jsonl, line 1: not the event that this search"):
        run(folder, "cmaes")
    run(folder, "gradient", versions={"jax": "2"})  # nothing is computed
    lines = (folder / "trace.jsonl").read_text().splitlines(keepends=True)
    (folder / "trace.jsonl").write_text("".join(lines[:3]))
    with pytest.raises(UserError, match=r"out: started differently: jax 1 -> 2"):
        run(folder, "gradient", versions={"jax": "2"})
    run(folder, "gradient", versions={"jax": "2"}, accept_versions=True)
    assert json.loads((folder / "settings.json").read_text())["accepted"] == ["jax 1 -> 2"]
    (folder / "trace.jsonl").write_text("[1]\n")
    with pytest.raises(UserError, match=r"trace.jsonl, line 1: not an event of a search"):
        Trace(folder, SETTINGS)
    with pytest.raises(UserError, match="contains other files, but no search of sdjax tune"):
        Trace(tmp_path, SETTINGS)


def test_other_weights_or_problems_are_named(tmp_path):
    first = {"weights": {"base": "a1", "expert_1": "b1", "expert_2": "c1"}, "problems": "0a" * 8}
    with Trace(tmp_path / "out", first) as trace:
        trace.record({"event": "step"}, lambda: {"gradient": [1.0]})
    other_weights = {"base": "a2", "expert_1": "b2", "expert_2": "c1"}
    for changes, message in (
        (
            {"weights": other_weights},
            "that differs in the weights of base, expert_1; choose another",
        ),
        ({"weights": {"base": "a1"}}, "that differs in the weights of expert_1, expert_2; choose"),
        ({"problems": "1b" * 8}, "that differs in the problems; choose another --out"),
    ):
        with pytest.raises(UserError, match=f"out: contains a search of sdjax tune {message}"):
            Trace(tmp_path / "out", first | changes)


def test_folder_without_events_takes_other_settings(tmp_path):
    Trace(tmp_path, SETTINGS, versions={"jax": "1"}).close()
    with Trace(tmp_path, {"task": "gsm8k"}, versions={"jax": "2"}) as trace:
        trace.record({"event": "step"}, lambda: {"gradient": [1.0]})
    with pytest.raises(UserError, match="search of sdjax tune with task = 'gsm8k', not 'arithmet"):
        Trace(tmp_path, SETTINGS, versions={"jax": "2"})
