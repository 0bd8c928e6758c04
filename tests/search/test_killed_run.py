"""A run that is killed at random moments and resumed each time gives the same results."""

import dataclasses
import hashlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdjax.search.comparison_config import ControlsConfig, RunTuningConfig
from sdjax.search.memory_config import MemoryConfig
from sdjax.search.score_types import (
    Answer,
    Application,
    Candidate,
    CandidateOutcome,
    Comparison,
    ScoredStructure,
    StoredOutcome,
    StoredPair,
    TestOpening,
)
from sdjax.search.store import Store
from sdjax.search.types import PURPOSES, Attempt, Checkpoint, Entry, Lineage, Program
from sdjax.tuning.search import SearchConfig

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).with_name("killed_run.py")
KILLS = 20
LONGEST_DELAY = 1.0
NEVER = 10**9
RECORDS = (
    *(Answer, Candidate, CandidateOutcome, Checkpoint, Comparison, Entry, Lineage, Program),
    *(ScoredStructure, StoredOutcome, StoredPair, TestOpening),
)
MEASURED = ("seconds", "answered_at")


def without_times(value):
    """Return JSON data without what is measured."""
    if isinstance(value, dict):
        return {key: without_times(one) for key, one in value.items() if key not in MEASURED}
    return [without_times(one) for one in value] if isinstance(value, list) else value


def results(folder):
    """Return everything that must not depend on interruptions."""
    with Store.open(folder) as store:
        assert store.run().finished_at is not None
        assert store.select(Attempt) == ()
        records = {
            kind.__name__: sorted(
                json.dumps(without_times(dataclasses.asdict(one)), sort_keys=True, default=str)
                for one in store.select(kind)
            )
            for kind in (*RECORDS, Application)
        }
        samples = [dataclasses.asdict(s) for p in PURPOSES for s in store.judged(purpose=p)]
        table = sorted(map(repr, store.summaries(None, None)))
    adapters = {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "adapters").rglob("*.safetensors"))
    }
    return {**records, "samples": samples, "table": table, "adapters": adapters}


def start(config, folder, moment, compiled):
    """Start the run of a folder; it reports when there have been more than `moment` moments."""
    return subprocess.Popen(
        [sys.executable, SCRIPT, json.dumps(config.to_json()), folder, str(moment)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "JAX_COMPILATION_CACHE_DIR": str(compiled)},
    )


def complete(config, folder, compiled):
    with start(config, folder, NEVER, compiled) as process:
        _, error = process.communicate(timeout=3000)
    assert process.returncode == 0, error[-3000:]


def answered(folder):
    return sum(map(int, Path(f"{folder}.answers").read_text().split()))


def processes_of(session):
    """Return the processes of a session, which its leader has started."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(int(stat.parent.name))
    return found


def await_end_of(session):
    """Wait until the workers of a killed process have ended."""
    deadline = time.monotonic() + 300
    while processes_of(session):
        assert time.monotonic() < deadline, "a killed run leaves its workers behind"
        time.sleep(0.05)


def with_random_programs(config):
    """Score as written; train on pairs; random programs are a control."""
    return dataclasses.replace(config, controls=dataclasses.replace(config.controls, random=True))


def with_structures(config):
    """Score programs by their best numbers; train on pairs."""
    return dataclasses.replace(config, score="tuned")


def with_islands(config):
    """Score as written; prompts show programs of islands; train on samples."""
    memory = MemoryConfig(
        parents="islands", islands=2, migration=1, archive=True, refused=1, samples_per_prompt=4
    )
    decoding = dataclasses.replace(config.generation.decoding, buckets=(16, 352))
    generation = dataclasses.replace(config.generation, memory=memory, decoding=decoding)
    training = dataclasses.replace(config.training, objective="entropic", nll_weight=0.0)
    return dataclasses.replace(config, iterations=3, generation=generation, training=training)


@pytest.mark.parametrize("variant", [with_random_programs, with_structures, with_islands])
def test_run_killed_at_random_moments_gives_the_same_results(small_config, tmp_path, variant):
    config = variant(
        dataclasses.replace(
            small_config,
            tuning=RunTuningConfig(programs=1, search=SearchConfig(budget=2, steps=2, batch=2)),
            controls=ControlsConfig(tuned=("weights",), random=False, max_evaluations=4),
            test=dataclasses.replace(small_config.test, ablations=1),
        )
    )
    compiled, whole, killed = (tmp_path / name for name in ("compiled", "whole", "killed"))
    complete(config, whole, compiled)
    moments = Path(f"{whole}.moments").stat().st_size
    rng = random.Random(f"{variant.__name__} 19")
    for moment in sorted(rng.sample(range(moments), KILLS)):
        with start(config, killed, moment, compiled) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "now\n", process.communicate()[1][-3000:]
            time.sleep(rng.uniform(0, LONGEST_DELAY))
            process.kill()
        assert process.returncode == -9
        await_end_of(process.pid)
    complete(config, killed, compiled)
    before, after = results(whole), results(killed)
    for key, expected in before.items():
        assert after[key] == expected, key
    assert any(sample["parents"] for sample in before["samples"])
    assert len(before["adapters"]) == config.iterations - 1
    # A process repeats only the answers of the evaluation in which an earlier one was killed.
    most = max(config.task.development - config.task.confirmation, config.task.test)
    assert answered(whole) <= answered(killed) <= answered(whole) + KILLS * most
