"""Programs in whose tuning a run was killed."""

import dataclasses
import json
import logging
import subprocess
import sys

import pytest

from sdjax.search import tune
from sdjax.search.attempts import pending_attempt
from sdjax.search.comparison_config import RunTuningConfig
from sdjax.search.store import Store
from sdjax.search.types import Attempt, Entry, Program, Setting, program_entry
from sdjax.training.packing import Example
from sdjax.tuning.search import SearchConfig
from tests.tuning.searches import tunable

SOURCE = "def merge_models(task_vectors):\n    return 0.5 * task_vectors['expert_1']\n"
SEARCH = SearchConfig(budget=1, steps=1, batch=2)


@pytest.fixture
def identity(sandbox):
    return sandbox.judge(SOURCE).identity


@pytest.fixture
def store(sandbox, identity, tmp_path):
    """Return a store with the program SOURCE."""
    with Store.create(tmp_path, config={}, versions={}, layers=[]) as store:
        store.save_setting(Setting(seed="zoo:seed", slots={}, scope="mlp", task="sums"))
        program = Program(identity=identity, source=SOURCE, ir=sandbox.judge(SOURCE).ir)
        entry = Entry(name=program_entry(identity), kind="program", identity=identity)
        store.save(program, entry)
        yield store


@pytest.fixture
def tune_it(context, store, sandbox, identity, monkeypatch):
    """Return a function that tunes SOURCE as a run does, and returns the attempts it saw."""
    monkeypatch.setattr(sandbox, "try_merge", lambda ir, trial: None)
    config = dataclasses.replace(context.config, tuning=RunTuningConfig(search=SEARCH))
    tuned, seen = dataclasses.replace(context, config=config), []

    def interrupted(*arguments):
        seen.append(pending_attempt(store.folder))
        raise KeyboardInterrupt

    monkeypatch.setattr(tune, "run_once", interrupted)

    def run():
        seen.clear()
        try:
            tune._tune_program(tuned, store, sandbox, identity, [])
        except KeyboardInterrupt:
            assert store.select(Attempt) == ()  # the process lives
        return list(seen)

    return run


def test_program_is_not_tuned_again_after_the_second_death(store, identity, tune_it, caplog):
    name = program_entry(identity)
    assert tune_it() == [(name, tune.TUNING_FOLDER, 1)]
    store.save(Attempt(entry=name, setting=tune.TUNING_FOLDER, number=1))
    assert tune_it() == [(name, tune.TUNING_FOLDER, 2)]
    store.save(Attempt(entry=name, setting=tune.TUNING_FOLDER, number=2))
    message = (
        f"not tuned: program {identity[:8]}: the run crashed, hung or was killed while it compiled "
        "or ran this program"
    )
    with caplog.at_level(logging.INFO):
        assert tune_it() == tune_it() == []
    assert [record.getMessage() for record in caplog.records] == [message, message]
    assert store.select(Attempt) == ()


def test_program_whose_gradient_is_refused_is_searched_by_evolution(context, caplog):
    config = dataclasses.replace(context.config, tuning=RunTuningConfig(search=SEARCH))
    refused = dataclasses.replace(tunable(), gradient_refusal="compiler (cpu): too slow")
    with caplog.at_level(logging.INFO):
        loss = tune.differentiable_loss(
            dataclasses.replace(context, config=config),
            refused,
            [Example(prompt=(5, 6), target=(9, 1))],
            SEARCH,
        )
    assert loss is None
    (record,) = caplog.records
    text = f"{refused.name}: the gradient is refused: compiler (cpu): too slow: tuned by CMA-ES"
    assert record.getMessage() == text


CRASHING = """
import os, signal, sys
from sdjax import __main__
sys.argv[1:] = ["run", sys.argv[1], "--out=" + sys.argv[2]]
from sdjax.cli import watchdog
watch = watchdog.watch_run
def watch_and_crash():
    watch()
    from sdjax.tuning.loss import MergeLoss
    def crash(self, *_):
        os.kill(os.getpid(), signal.SIGSEGV)
    MergeLoss.__call__ = crash
watchdog.watch_run = watch_and_crash
__main__.start()
"""


@pytest.mark.slow
def test_run_that_crashes_in_the_gradient_ends_without_tuning_the_programs(small_config, tmp_path):
    config = dataclasses.replace(
        small_config,
        iterations=1,
        tuning=RunTuningConfig(programs=2, search=SEARCH),
    )
    (tmp_path / "config.yaml").write_text(json.dumps(config.to_json()))
    folder = tmp_path / "run"
    command = [sys.executable, "-c", CRASHING, str(tmp_path / "config.yaml"), str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=280, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    crashes = result.stderr.count("sdjax: the run crashed in a program; it resumes without it")
    with Store.open(folder) as store:
        entries = store.by_key(Entry).values()
        refused = [entry.identity for entry in entries if tune.NOT_TUNED in entry.detail]
        assert store.select(Attempt) == ()
    assert crashes == len(refused) == 2
    for identity in refused:
        assert f"not tuned: program {identity[:8]}: the run crashed" in result.stderr
    assert not (folder / tune.TUNING_FOLDER).exists()
