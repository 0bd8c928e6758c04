"""`sdjax run` on two processes: the results of one, and one message when it ends early."""

import dataclasses
import json
import signal
import time

import pytest

from sdjax.search.config import BaselinesConfig, DecodingConfig
from sdjax.search.loop import run
from sdjax.search.store import Store

SDJAX = ("-c", "from sdjax.cli import main; main()")


@pytest.fixture(scope="module")
def quick_config(small_config):
    """One iteration of four samples, untrained, four problems of each split."""
    return dataclasses.replace(
        small_config,
        iterations=1,
        task=dataclasses.replace(small_config.task, development=4, test=4),
        generation=dataclasses.replace(
            small_config.generation,
            samples=4,
            temperature=0.5,
            decoding=DecodingConfig(slots=4, rows=4, buckets=(16,), max_new_tokens=96),
        ),
        evaluation=DecodingConfig(slots=4, rows=4, buckets=(48,), max_new_tokens=4),
        training=dataclasses.replace(small_config.training, enabled=False),
        baselines=BaselinesConfig(paper={}),
    )


@pytest.fixture(scope="module")
def trained_config(quick_config, small_config):
    """Two iterations, of which each trains."""
    generation = dataclasses.replace(
        quick_config.generation, samples=8, temperature=small_config.generation.temperature
    )
    task = dataclasses.replace(small_config.task, development=16, test=4)
    return dataclasses.replace(
        small_config, generation=generation, task=task, baselines=quick_config.baselines
    )


def on_four_devices(config, path):
    """The configuration as a file, with slots and weights spread over both processes."""
    mesh = dataclasses.replace(config.mesh, data=2, tensor=2)
    path.write_text(json.dumps(dataclasses.replace(config, mesh=mesh).to_json()))
    return path


def facts(folder):
    with Store.open(folder) as store:
        return {
            "finished": store.run().finished_at is not None,
            "samples": [(s.iteration, s.number, s.text, s.status) for s in store.judged()],
            "scores": {
                (summary.candidate, summary.split): (summary.strict, summary.flexible)
                for summary in store.summaries(setting=None)
            },
            "pairs": [store.pairs(iteration) for iteration in (1, 2)],
            "checkpoints": [checkpoint.name for checkpoint in store.checkpoints()],
        }


def ended(processes, status, timeout=300):
    """What both wrote to standard output and error, after they ended with this status."""
    texts = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [status] * 2, texts
    return texts


def test_two_processes_get_the_results_of_one(quick_config, tmp_path, two_processes):
    config = on_four_devices(quick_config, tmp_path / "config.yaml")
    processes = two_processes(*SDJAX, "run", config, "--out", tmp_path / "two")
    run(quick_config, tmp_path / "one")
    (output, _), (silent, _) = ended(processes, 0)
    assert output.count("iteration 1: 4 samples") == output.count("report: ") == 1
    assert "iteration" not in silent
    assert "report" not in silent
    assert "merge_models" in (tmp_path / "two" / "report.html").read_text()
    assert facts(tmp_path / "two") == facts(tmp_path / "one")


def test_a_mistake_is_told_once_and_ends_both(tmp_path, two_processes):
    (tmp_path / "file").write_text("mine")
    processes = two_processes(*SDJAX, "run", "demo", "--out", tmp_path)
    (_, error), (_, silent) = ended(processes, 2, timeout=60)
    assert error.count("sdjax: ") == 1
    assert f"sdjax: {tmp_path}: is not empty" in error
    assert "sdjax: " not in silent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "victim", "status"), [(signal.SIGTERM, 1, 130), (signal.SIGKILL, 0, None)]
)
def test_two_processes_go_on_where_they_were_interrupted(
    trained_config, tmp_path, two_processes, number, victim, status
):
    """One is stopped while the second iteration is under way; then both are started again."""
    config = on_four_devices(trained_config, tmp_path / "config.yaml")
    folder = tmp_path / "two"
    processes = two_processes(*SDJAX, "run", config, "--out", folder)
    while not (folder / "generators" / "1" / "commit_success.txt").exists():
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)
    processes[victim].send_signal(number)
    if status is None:  # the other one is ended by JAX, in words of its own
        assert all(process.communicate(timeout=150) for process in processes)
        assert all(process.returncode != 0 for process in processes)
    else:
        (_, error), (_, silent) = ended(processes, status)
        line = f"sdjax: interrupted; go on with: sdjax run --resume {folder}"
        assert error.splitlines().count(line) == 1
        assert "interrupted" not in silent
    assert not facts(folder)["finished"]
    ended(two_processes(*SDJAX, "run", "--resume", folder), 0)
    run(trained_config, tmp_path / "one")
    assert facts(folder) == facts(tmp_path / "one")
