"""Limits of a search: what is left of it, why it ended, and its results."""

import dataclasses
import logging
from types import SimpleNamespace

import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.racing import Race
from sdjax.search import phase_clock
from sdjax.search.comparison_config import ControlsConfig, RunTuningConfig, StructuresConfig
from sdjax.search.config import LimitsConfig
from sdjax.search.controls import program_controls, samples_of_control
from sdjax.search.extension import check_samples
from sdjax.search.loop import run_search
from sdjax.search.phase_clock import PhaseClock
from sdjax.search.run_limits import (
    complete_samples,
    end_reason,
    is_trained,
    planned_samples,
    search_seconds,
)
from sdjax.search.score_types import Answer
from sdjax.search.store import Store
from sdjax.search.types import RANDOM, TEST, UNTRAINED, Change, Checkpoint, Sample
from sdjax.tuning.search import SearchConfig


@pytest.fixture
def store(small_config, tmp_path):
    with Store.create(
        tmp_path / "run", config=small_config.to_json(), versions={}, layers=[]
    ) as store:
        yield store


def limited(config, **limits):
    return dataclasses.replace(config, iterations=3, limits=LimitsConfig(**limits))


def sample(store, iteration, count):
    """Save the samples of an iteration, complete."""
    prompt = store.save_prompt("short", "")
    empty = {"prompt": prompt, "text": "", "tokens": (), "stopped": True, "source": None}
    store.save(*(Sample(iteration=iteration, number=number, **empty) for number in range(count)))
    store.save_phase(iteration, "generate", 1.0)


def test_limit_of_programs_cuts_the_last_iteration(small_config, store):
    assert planned_samples(limited(small_config), store) == (8, 8, 8)
    assert planned_samples(limited(small_config, max_programs=100), store) == (8, 8, 8)
    config = limited(small_config, max_programs=12)
    assert planned_samples(config, store) == (8, 4)
    # The generator of an iteration without samples is not trained.
    assert [is_trained(config, store, number) for number in (1, 2, 3)] == [True, False, False]
    training = dataclasses.replace(config.training, after_last=True)
    after_last = dataclasses.replace(config, training=training)
    assert [is_trained(after_last, store, number) for number in (1, 2, 3)] == [True, True, False]
    assert planned_samples(limited(small_config, max_programs=8), store) == (8,)
    # A run that is given more keeps what it has.
    sample(store, 1, 8)
    sample(store, 2, 4)
    assert planned_samples(config, store) == (8, 4)
    assert planned_samples(limited(small_config), store) == (8, 4, 8)
    assert planned_samples(limited(small_config, max_programs=15), store) == (8, 4, 3)


def test_iteration_without_samples_is_planned_again(small_config, store):
    sample(store, 1, 8)
    sample(store, 2, 3)
    for number in (1, 2):
        store.save_phase(number, "score", 1.0)
    assert end_reason(limited(small_config), store) is None
    sample(store, 3, 0)
    config = dataclasses.replace(limited(small_config), iterations=4)
    assert complete_samples(store) == {1: 8, 2: 3}
    assert planned_samples(config, store) == (8, 3, 8, 8)
    assert end_reason(config, store) == (
        "generators that have nothing left to write: 11 of 32 programs"
    )
    check = [Change(kind="config", key="generation.samples", old="8", new="9")]
    check_samples(limited(small_config), check, len(complete_samples(store)))


def test_controls_have_as_many_samples_as_the_limit_leaves(small_config):
    config = dataclasses.replace(
        limited(small_config, max_programs=12), controls=ControlsConfig(tuned=())
    )
    assert program_controls(config) == (RANDOM, UNTRAINED)
    assert [samples_of_control(config, purpose) for purpose in (RANDOM, UNTRAINED)] == [12, 4]
    one = dataclasses.replace(config, limits=LimitsConfig(max_programs=8))
    assert program_controls(one) == (RANDOM,)


def test_reason_of_an_early_end_is_known_from_the_store(small_config, store):
    sample(store, 1, 8)
    store.save_phase(1, "score", 3600.0)
    config = limited(small_config, max_programs=8)
    assert end_reason(config, store) == "limits.max_programs = 8: 8 of 24 programs"
    assert end_reason(limited(small_config, max_hours=2), store) is None  # it was interrupted
    assert end_reason(limited(small_config, max_hours=1), store) == (
        "limits.max_hours = 1: 1 of 3 iterations are complete after 1 h"
    )
    for number in (2, 3):
        store.save_phase(number, "score", 1.0)
    assert end_reason(limited(small_config, max_hours=1), store) is None


def test_hours_count_over_all_processes_of_a_run(small_config, store, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(phase_clock.time, "monotonic", lambda: clock.now)
    plan = SimpleNamespace(config=limited(small_config, max_hours=1))

    def work(seconds, *, killed=False):
        phases = PhaseClock(plan, store)
        with phases.timed(1, "score"):
            clock.now += seconds
            is_over = phases.out_of_time()
            if killed:
                clock.now += 4.0  # which nothing has noted
                raise KeyboardInterrupt
        return is_over

    for seconds in (1000.0, 2000.0):
        with pytest.raises(KeyboardInterrupt):
            work(seconds, killed=True)
    assert search_seconds(store) == 3000.0
    assert store.phases() == {}
    assert not work(599.0)
    assert store.phases() == {(1, "score"): 3599.0}
    assert store.unfinished_phases() == {}
    assert not PhaseClock(plan, store).out_of_time()
    store.save_phase(0, "controls", 3600.0)  # not part of the search
    assert not PhaseClock(plan, store).out_of_time()
    store.save_phase(0, "baselines", 1.0)
    assert PhaseClock(plan, store).out_of_time()


def results(folder):
    with Store.open(folder) as store:
        samples = [(one.iteration, one.number, one.text, one.status) for one in store.judged()]
        return samples, store.summaries(), store.select(Answer), store.select(Checkpoint)


@pytest.mark.slow
def test_run_with_a_limit_of_programs_has_its_answer_and_can_be_given_more(
    small_config, tmp_path, caplog
):
    caplog.set_level(logging.INFO, logger="sdjax")
    run_search(small_config, tmp_path / "whole")
    config = dataclasses.replace(small_config, limits=LimitsConfig(max_programs=12))
    run_search(config, tmp_path / "run")
    assert "by limits.max_programs = 12: 12 of 16 programs" in caplog.text
    samples, summaries, (answer,), _ = results(tmp_path / "run")
    first = [one for one in results(tmp_path / "whole")[0] if one[0] == 1 or one[1] < 4]
    assert samples == first
    assert answer.sentence
    assert {one.split for one in summaries} == {"development", "confirmation", TEST}
    run_search(dataclasses.replace(small_config, iterations=3), tmp_path / "run")
    with Store.open(tmp_path / "run") as store:
        counts = [len(store.sample_numbers(number)) for number in (1, 2, 3)]
        assert [one.iteration for one in store.select(Checkpoint)] == [1, 2]
    assert counts == [8, 4, 8]


@pytest.mark.slow
@pytest.mark.parametrize("score", ["as_written", "tuned"])
def test_run_out_of_time_has_its_answer_and_can_be_given_more(
    small_config, tmp_path, monkeypatch, caplog, score
):
    caplog.set_level(logging.INFO, logger="sdjax")
    search = SearchConfig(budget=1, steps=1, batch=2)
    structures = StructuresConfig(steps=0, candidates=1)
    whole = dataclasses.replace(
        small_config,
        iterations=1,
        score=score,
        race=Race(first_rung=6, winners=1, z=0.5),
        tuning=RunTuningConfig(programs=1, structures=structures, search=search),
        test=dataclasses.replace(small_config.test, top_k=1),
    )
    run_search(whole, tmp_path / "whole")
    limit = dataclasses.replace(whole, limits=LimitsConfig(max_hours=1.0))
    calls = iter(range(1000))
    monkeypatch.setattr(PhaseClock, "out_of_time", lambda clock: next(calls) > 10)
    run_search(limit, tmp_path / "run")
    _, summaries, (answer,), _ = results(tmp_path / "run")
    assert answer.sentence
    before = [one for one in results(tmp_path / "whole")[1] if one.split == "development"]
    scored = [one for one in summaries if one.split == "development"]
    assert len(scored) < len(before)
    monkeypatch.undo()
    run_search(whole, tmp_path / "run")
    assert results(tmp_path / "run")[0] == results(tmp_path / "whole")[0]


@pytest.mark.slow
def test_run_out_of_time_without_a_score_is_an_error(small_config, tmp_path):
    config = dataclasses.replace(small_config, limits=LimitsConfig(max_hours=1e-6))
    with pytest.raises(UserError, match=r"no program was scored within limits.max_hours = 1e-06; "):
        run_search(config, tmp_path / "run")
