"""`sdjax run` on two processes: the results of one process, and one error message."""

import dataclasses
import json
import signal
import time
from types import SimpleNamespace

import pytest

from sdjax.decoding.config import DecoderConfig
from sdjax.sandbox.verdict import Verdict
from sdjax.search import multihost
from sdjax.search.comparison_config import BaselinesConfig, RunTuningConfig, StructuresConfig
from sdjax.search.loop import run_search
from sdjax.search.score_types import Candidate, StoredPair
from sdjax.search.store import Store
from sdjax.search.types import Checkpoint

SDJAX = ("-c", "from sdjax.cli.main import main; main()")


@pytest.fixture(scope="module")
def quick_config(small_config):
    """One iteration of four samples without training, at most four problems per split."""
    return dataclasses.replace(
        small_config,
        iterations=1,
        task=dataclasses.replace(small_config.task, development=6, confirmation=2, test=4),
        generation=dataclasses.replace(
            small_config.generation,
            samples=4,
            temperature=0.5,
            decoding=DecoderConfig(slots=4, prefill_batch=4, buckets=(16, 224), max_new_tokens=96),
        ),
        evaluation=DecoderConfig(slots=4, prefill_batch=4, buckets=(48,), max_new_tokens=4),
        training=dataclasses.replace(small_config.training, enabled=False),
        baselines=BaselinesConfig(paper={}),
    )


@pytest.fixture(scope="module")
def trained_config(quick_config, small_config):
    """Two iterations with training."""
    generation = dataclasses.replace(
        quick_config.generation, samples=8, temperature=small_config.generation.temperature
    )
    task = dataclasses.replace(small_config.task, development=16, confirmation=0, test=4)
    return dataclasses.replace(
        small_config, generation=generation, task=task, baselines=quick_config.baselines
    )


def on_four_devices(config, path):
    """Write the config for a mesh over the devices of both processes."""
    mesh = dataclasses.replace(config.mesh, data=2, tensor=2)
    path.write_text(json.dumps(dataclasses.replace(config, mesh=mesh).to_json()))
    return path


def results(folder):
    with Store.open(folder) as store:
        return {
            "finished": store.run().finished_at is not None,
            "samples": [(s.iteration, s.number, s.text, s.status) for s in store.judged()],
            "scores": {
                (summary.entry, summary.split): (summary.strict, summary.flexible)
                for summary in store.summaries(setting=None)
            },
            "pairs": [
                dataclasses.replace(
                    pair,
                    chosen=dataclasses.replace(pair.chosen, change=0),
                    rejected=dataclasses.replace(pair.rejected, change=0),
                )
                for pair in store.select(StoredPair)
            ],
            "changes": [
                side.change
                for pair in store.select(StoredPair)
                for side in (pair.chosen, pair.rejected)
            ],
            "checkpoints": [checkpoint.name for checkpoint in store.select(Checkpoint)],
        }


def assert_same_results(one, two):
    one, two = results(one), results(two)
    # Sums over devices, whose order differs.
    assert two.pop("changes") == pytest.approx(one.pop("changes"), rel=1e-6)
    assert two == one


def finish(processes, status, timeout=300):
    """Wait for both processes, check their status, and return their stdout and stderr."""
    texts = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [status] * 2, texts
    return texts


def test_two_processes_give_the_results_of_one(quick_config, tmp_path, two_processes):
    config = on_four_devices(quick_config, tmp_path / "config.yaml")
    processes = two_processes(*SDJAX, "run", config, "--out", tmp_path / "two")
    run_search(quick_config, tmp_path / "one")
    (output, log), (second_output, second_log) = finish(processes, 0)
    assert log.count("iteration 1: 4 samples") == output.count("report: ") == 1
    assert "iteration" not in second_output + second_log
    assert "report" not in second_output + second_log
    assert "merge_models" in (tmp_path / "two" / "report.html").read_text()
    assert_same_results(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_two_processes_score_structures_as_one_does(quick_config, tmp_path, two_processes):
    structures = StructuresConfig(steps=1, batch=4, candidates=1)
    tuning = RunTuningConfig(structures=structures, programs=0)
    tuned = dataclasses.replace(quick_config, score="tuned", race=None, tuning=tuning)
    config = on_four_devices(tuned, tmp_path / "config.yaml")
    processes = two_processes(*SDJAX, "run", config, "--out", tmp_path / "two")
    run_search(tuned, tmp_path / "one")
    finish(processes, 0)
    stored = []
    for folder in ("one", "two"):
        with Store.open(tmp_path / folder) as store:
            found = store.select(Candidate)
            assert {one.origin for one in found} >= {"written", "gradient"}
            stored.append([(one.structure, one.number, one.origin, one.steps) for one in found])
    assert stored[0] == stored[1]


def test_main_process_yields_the_verdicts_of_its_sandbox(monkeypatch):
    """Check that it does not lose the verified program, and that the others get equal verdicts."""
    messages = []

    def send(compute):
        messages.append(compute())
        return messages[-1]

    verdicts = [
        Verdict(verdict="admitted", identity="a", ir="{}", notes=("note",), program=object()),
        Verdict(verdict="refused", rule="syntax", message="line 1: invalid syntax"),
    ]
    sandbox = SimpleNamespace(layers=("seccomp",), judge_all=lambda sources: enumerate(verdicts))
    monkeypatch.setattr(multihost.jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost, "broadcast_from_main", send)
    on_main = list(multihost.judge_all(sandbox, ["first", "second"]))
    assert [index for index, _, _ in on_main] == [0, 1]
    assert all(found is own for (_, found, _), own in zip(on_main, verdicts, strict=True))
    monkeypatch.setattr(multihost, "broadcast_from_main", lambda compute: messages.pop(0))
    on_other = list(multihost.judge_all(None, ["first", "second"]))
    assert on_other == on_main  # `program` is not compared
    assert all(verdict.program is None for _, verdict, _ in on_other)


def test_user_error_is_printed_once_and_ends_both(tmp_path, two_processes):
    (tmp_path / "file").write_text("mine")
    processes = two_processes(*SDJAX, "run", "demo", "--out", tmp_path)
    (_, error), (_, silent) = finish(processes, 2)
    assert error.count("sdjax: ") == 1
    assert f"sdjax: {tmp_path}: not empty" in error
    assert "sdjax: " not in silent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "victim", "status"), [(signal.SIGTERM, 1, 130), (signal.SIGKILL, 0, None)]
)
def test_two_processes_resume_after_an_interruption(
    trained_config, tmp_path, two_processes, number, victim, status
):
    """Stop one process during the second iteration; then resume with both."""
    config = on_four_devices(trained_config, tmp_path / "config.yaml")
    folder = tmp_path / "two"
    processes = two_processes(*SDJAX, "run", config, "--out", folder)
    while not (folder / "generators" / "1" / "commit_success.txt").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[victim].send_signal(number)
    if status is None:  # JAX ends the other process with its own message
        assert all(process.communicate(timeout=150) for process in processes)
        assert all(process.returncode != 0 for process in processes)
    else:
        (_, error), (_, silent) = finish(processes, status)
        line = f"sdjax: interrupted; resume with: sdjax run --resume {folder}"
        assert error.splitlines().count(line) == 1
        assert "interrupted" not in silent
    assert not results(folder)["finished"]
    finish(two_processes(*SDJAX, "run", "--resume", folder), 0)
    run_search(trained_config, tmp_path / "one")
    assert results(folder) == results(tmp_path / "one")
