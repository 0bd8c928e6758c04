import dataclasses
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.task import Outcome
from sdjax.search.pairs import preferences_of_run
from sdjax.search.schema import TABLES
from sdjax.search.score_types import Application, ScoredSample, StoredPair
from sdjax.search.store import Store
from sdjax.search.types import (
    MAIN,
    Change,
    Checkpoint,
    Entry,
    Lineage,
    Program,
    RunInput,
    Sample,
    Setting,
    StoredVerdict,
    program_entry,
)

CONFIG = {"seed": "zoo:seed", "generation": {"samples": 4}}
SETTING = Setting(seed="zoo:seed", slots={"expert_1": "zoo:a"}, scope="mlp", task="sums")


def create(folder: Path) -> Store:
    return Store.create(folder, config=CONFIG, versions={"jax": "0.10.2"}, layers=["rlimits"])


def save_admitted(store: Store, source: str, identity: str, layers=(), **fields) -> None:
    """Save an admissible program; `fields` are those of the program."""
    verdict = StoredVerdict(source=source, verdict="admitted", identity=identity, layers=layers)
    store.save(verdict, Program(identity=identity, source=source, **fields))


def refused(source: str) -> StoredVerdict:
    return StoredVerdict(source=source, verdict="refused", rule="import", message="no import os")


def sample(number: int, source: str | None, prompt: str, iteration: int = 1) -> Sample:
    return Sample(
        iteration=iteration,
        number=number,
        prompt=prompt,
        text=source or "no code",
        tokens=(1, 70000, number),
        stopped=True,
        source=source,
    )


def outcome(problem: str, correct: bool) -> Outcome:
    return Outcome(problem_id=problem, output="= 4", strict=correct, flexible=True)


def test_store_round_trip(tmp_path):
    with create(tmp_path) as store:
        store.save_setting(SETTING)
        store.save(Checkpoint(name="g1", iteration=1, path="checkpoints/1", detail={"steps": 3}))
        store.save(Lineage(iteration=1, generator="zoo:seed", temperature=1.2))
        store.save(Lineage(iteration=2, generator="zoo:seed", checkpoint="g1", temperature=1.0))
        store.save_phase(1, "generate", 2.5)
        prompt = store.save_prompt("short", "def\n")
        assert store.save_prompt("short", "def\n") == prompt
    with Store.open(tmp_path) as store:
        run = store.run()
        assert run.config == CONFIG
        assert run.layers == ("rlimits",)
        assert run.finished_at is None
        assert store.select(Setting) == (SETTING,)
        assert [one.checkpoint for one in store.select(Lineage)] == [None, "g1"]
        assert store.select(Checkpoint)[0].detail == {"steps": 3}
        assert store.phases() == {(1, "generate"): 2.5}
        assert store.prompts() == {prompt: "def\n"}


def test_sample_status_is_independent_of_the_order_of_verdicts(tmp_path):
    with create(tmp_path) as store:
        store.save_setting(SETTING)
        prompt = store.save_prompt("short", "def\n")
        sources = ["a", "bad", "a ", None, "b", "late", "nan", "c"]
        store.save(*(sample(n, source, prompt) for n, source in enumerate(sources)))
        store.save(sample(0, "b", prompt, iteration=2))
        for source, identity in (("nan", "X"), ("a ", "A"), ("a", "A")):
            save_admitted(store, source, identity, layers=("seccomp",))
        for source, identity in (("c", "C"), ("b", "B")):  # same outputs on the probes
            save_admitted(store, source, identity, fingerprint="f")
        store.save(refused("bad"))
        store.save(Entry(name="program:X", kind="program", identity="X"))
        not_finite = Application(
            entry="program:X", verdict="non-finite", rule="weights", change=float("nan")
        )
        store.save(not_finite)
        assert store.by_key(Application, setting=MAIN) == {
            "program:X": dataclasses.replace(not_finite, change=0.0)
        }
        judged = store.judged()
        assert [one.status for one in judged] == [
            "admitted",
            "refused",
            "duplicate",
            "no program",
            "admitted",
            "not judged",
            "non-finite",
            "duplicate",
            "duplicate",
        ]
        assert judged[7].identity == "B"
        assert (judged[1].rule, judged[6].rule) == ("import", "weights")
        assert judged[0].tokens == (1, 70000, 0)
        assert [one.status for one in store.judged(2)] == ["duplicate"]
        assert store.by_key(StoredVerdict)["a"].layers == ("seccomp",)
        assert store.by_key(StoredVerdict).get("never") is None
        assert store.sample_numbers(1) == set(range(8))


def test_first_verdict_on_a_source_is_kept(tmp_path):
    with create(tmp_path) as store:
        save_admitted(store, "a", "A", ir="{}", cost=2**70, notes=("scales expert_1",))
        store.save(refused("a"))
        assert store.by_key(StoredVerdict)["a"].verdict == "admitted"
        assert store.program("A").cost == 2**63 - 1
        assert store.program("A").ir == "{}"
        assert store.by_key(Program)["A"].notes == ("scales expert_1",)
        with pytest.raises(UserError, match="table program, column identity: no 'B'"):
            store.program("B")


def test_training_membership_and_families_of_programs(tmp_path):
    with create(tmp_path) as store:
        save_admitted(store, "a", "A")
        program = store.program("A")
        assert (program.in_training, program.families, program.held_out) == (None, None, None)
        save_admitted(store, "b", "B", in_training=False, families=("a", "b"), held_out=())
        program = store.program("B")
        assert (program.in_training, program.families, program.held_out) == (False, ("a", "b"), ())


def test_complete_evaluation_accepts_no_more_scores(tmp_path):
    with create(tmp_path) as store:
        store.save_setting(SETTING)
        store.save(Entry(name="seed", kind="seed"))
        store.save_scores("seed", "test", [outcome("p1", True)], complete=False)
        assert not store.summaries()[0].complete
        store.save_scores("seed", "test", [outcome("p2", False)])
        (summary,) = store.summaries("test")
        assert (summary.problems, summary.strict, summary.flexible) == (2, 0.5, 1.0)
        assert [one.problem_id for one in store.outcomes("seed", "test")] == ["p1", "p2"]
        with pytest.raises(ValueError, match="already scored"):
            store.save_scores("seed", "test", [outcome("p3", True)])
        assert store.outcomes("seed", "development") == ()


def test_entry_scored_in_several_settings(tmp_path):
    with create(tmp_path) as store:
        store.save_setting(SETTING)
        transfer = Setting(name="transfer", seed="zoo:seed", slots={}, scope="mlp", task="sums")
        store.save_setting(transfer)
        store.save(Entry(name="seed", kind="seed"))
        store.save_scores("seed", "test", [outcome("p1", True)])
        store.save_scores("seed", "test", [outcome("p1", False)], setting="transfer")
        assert [one.strict for one in store.summaries("test", None)] == [1.0, 0.0]
        with pytest.raises(ValueError, match="a different setting"):
            store.save_setting(Setting(seed="other", slots={}, scope="mlp", task="sums"))


def test_pairs_round_trip_in_order(tmp_path):
    with create(tmp_path) as store:
        prompt = store.save_prompt("short", "def\n")
        scored = []
        for identity, score in (("A", 0.9), ("B", 0.1)):
            save_admitted(store, identity, identity)
            scored.append(
                ScoredSample(
                    identity=identity,
                    prompt=prompt,
                    text=identity,
                    score=score,
                    change=1.0,
                    iteration=1,
                )
            )
        first, second = (
            StoredPair(iteration=iteration, number=0, chosen=scored[0], rejected=scored[1])
            for iteration in (1, 2)
        )
        store.save(first)
        assert store.select(StoredPair, iteration=1) == (first,)
        assert first.chosen.prompt == prompt
        with pytest.raises(sqlite3.IntegrityError):
            store.save(first)
        same = dataclasses.replace(first, number=1, rejected=first.chosen)
        with pytest.raises(sqlite3.IntegrityError):
            store.save(same)
        store.save(second)
        assert [pair.iteration for pair in store.select(StoredPair)] == [1, 2]
        refused = dataclasses.replace(
            scored[1], identity="", text="1 +", score=0.0, fault="refused"
        )
        without_program = dataclasses.replace(second, number=1, rejected=refused)
        store.save(without_program)
        assert store.select(StoredPair, iteration=2) == (second, without_program)
        store.delete(StoredPair, iteration=2, number=1)
        (text,) = store.prompts().values()
    assert preferences_of_run(tmp_path) == [{"prompt": text, "chosen": "A", "rejected": "B"}]


def test_failed_write_is_rolled_back(tmp_path):
    with create(tmp_path) as store:
        prompt = store.save_prompt("short", "def\n")
        with pytest.raises(sqlite3.IntegrityError):
            store.save(sample(1, "a", prompt), sample(2, "b", "no such prompt"))
        assert store.sample_numbers(1) == set()


def test_text_with_surrogates_is_stored(tmp_path):
    with create(tmp_path) as store:
        prompt = store.save_prompt("short", "def\n")
        hostile = "x\ud800\x00'; DROP TABLE sample; --"
        store.save(sample(0, hostile, prompt))
        store.save(refused(hostile))
        (one,) = store.judged()
        assert one.text == hostile.replace("\ud800", "\ufffd")
        assert one.source == one.text
        assert one.status == "refused"


def test_one_run_per_folder_and_one_writer_per_run(tmp_path):
    with create(tmp_path) as store:
        with pytest.raises(UserError, match="another process"):
            Store.open(tmp_path, write=True)
        with Store.open(tmp_path) as reader:
            assert reader.run().config == CONFIG
        store.finish()
    with pytest.raises(UserError, match=r"already contains a run.*--resume"):
        create(tmp_path)
    with Store.open(tmp_path, write=True) as store:
        assert store.run().finished_at is not None


def test_reader_cannot_write(tmp_path):
    create(tmp_path).close()
    with Store.open(tmp_path) as store, pytest.raises(UserError, match="read-only"):
        store.finish()


def test_amended_run_is_unfinished_only_if_its_config_changed(tmp_path):
    with create(tmp_path) as store:
        store.finish()
        finished_at = store.run().finished_at
        inputs = [RunInput(name="seed", fingerprint="1")]
        store.amend(config=CONFIG, versions={"jax": "0.12.0"}, inputs=inputs)
        store.finish()
        assert store.run().finished_at == finished_at
        assert store.run().versions == {"jax": "0.12.0"}
        change = Change(kind="config", key="generation.samples", old="4", new="5")
        larger = CONFIG | {"generation": {"samples": 5}}
        inputs = [RunInput(name="seed", fingerprint="2")]
        store.amend(config=larger, versions={}, inputs=inputs, changes=[change])
        run = store.run()
        assert (run.finished_at, run.config) == (None, larger)
        assert store.select(RunInput) == (RunInput(name="seed", fingerprint="2"),)
        (stored,) = store.select(Change)
        assert dataclasses.replace(stored, changed_at="") == change
        assert stored.changed_at > run.started_at


def test_database_of_an_earlier_version_has_the_defaults_of_later_columns(tmp_path):
    with create(tmp_path) as store:
        earlier = sample(0, "a", store.save_prompt("short", "def"))
        store.save(earlier)
    connection = sqlite3.connect(tmp_path / "run.sqlite")
    for table, columns in (
        ("sample", ("generator", "parents", "operation")),
        ("program", ("base",)),
        ("lineage", ("base", "generator_base")),
    ):
        for column in columns:
            connection.execute(f"ALTER TABLE {table} DROP COLUMN {column}")
    for table in TABLES.values():
        if table.since == 8:
            connection.execute(f"DROP TABLE {table.name}")
    connection.execute("PRAGMA user_version = 7")
    connection.close()
    with Store.open(tmp_path) as store:
        assert store.select(Sample) == (earlier,)
    later = dataclasses.replace(
        sample(1, "b", earlier.prompt),
        generator="endpoint",
        parents=("p", "q"),
        operation="combine",
    )
    with Store.open(tmp_path, write=True) as store:
        store.save(later)
        assert store.select(Sample) == (earlier, later)
    with Store.open(tmp_path) as store:
        assert store.select(Sample) == (earlier, later)


def test_missing_newer_or_foreign_database_raises_user_error(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        Store.open(tmp_path)
    create(tmp_path).close()
    connection = sqlite3.connect(tmp_path / "run.sqlite")
    connection.execute("PRAGMA user_version = 9")
    connection.close()
    with pytest.raises(UserError, match="database version 9"):
        Store.open(tmp_path)
    connection = sqlite3.connect(tmp_path / "run.sqlite")
    connection.execute("PRAGMA user_version = 2")
    connection.close()
    with pytest.raises(UserError, match=r"written by sdjax 0\.1.*use sdjax 0\.1"):
        Store.open(tmp_path)
    (tmp_path / "run.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(UserError, match="cannot be read"):
        Store.open(tmp_path, write=True)


def test_damaged_database_raises_user_error(tmp_path):
    with create(tmp_path) as store:
        prompt = store.save_prompt("short", "def\n")
        store.save(*(sample(n, "a" * 500, prompt) for n in range(200)))
    path = tmp_path / "run.sqlite"
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = os.urandom(len(data) - len(data) // 2)
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        Store.open(tmp_path)
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(UserError, match=r"damaged|cannot be read"):
        Store.open(tmp_path)


WRITER = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_store import SETTING, create, outcome, sample, save_admitted
from sdjax.search.types import Entry
store = create(Path({folder!r}))
store.save_setting(SETTING)
prompt = store.save_prompt("short", "def")
for n in range(10**6):
    store.save(sample(n, str(n), prompt))
    save_admitted(store, str(n), str(n))
    store.save(Entry(name=f"program:{{n}}", kind="program", identity=str(n)))
    store.save_scores(f"program:{{n}}", "development", [outcome(str(i), True) for i in range(50)])
    print(n, flush=True)
"""


def test_commits_survive_sigkill(tmp_path):
    script = WRITER.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    writer = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    committed = -1
    try:
        while committed < 20:
            line = writer.stdout.readline()
            assert line, "the writer exited unexpectedly"
            committed = int(line)
        time.sleep(0.003)  # so that it dies anywhere in a write
    finally:
        os.kill(writer.pid, signal.SIGKILL)
        rest = writer.stdout.read().split()
        writer.wait()
    committed = max([committed, *map(int, rest)])
    with Store.open(tmp_path, write=True) as store:
        samples = store.judged()
        scored = store.summaries("development")
        assert [one.status for one in samples][: committed + 1] == ["admitted"] * (committed + 1)
        assert committed + 1 <= len(scored) <= committed + 2
        assert {one.problems for one in scored} == {50}
        assert all(one.complete for one in scored)
        # the run can be resumed
        number = len(samples)
        store.save(sample(number, "more", samples[0].prompt))
        save_admitted(store, "more", "more")
        name = program_entry("more")
        store.save(Entry(name=name, kind="program", identity="more"))
        store.save_scores(name, "development", [outcome("1", True)])
        assert len(store.judged()) == number + 1


def test_kill_during_creation_leaves_the_folder_usable(tmp_path):
    (tmp_path / ".run.sqlite.partial").write_bytes(b"half")
    with create(tmp_path) as store:
        assert store.run().config == CONFIG


def test_mirror_is_an_independent_copy(tmp_path):
    with create(tmp_path) as store:
        store.save_setting(SETTING)
        prompt = store.save_prompt("short", "write")
        store.save(sample(0, "a", prompt))
        with Store.mirror(tmp_path, store.content()) as mirror:
            assert mirror.run() == store.run()
            assert mirror.select(Setting) == (SETTING,)
            assert mirror.judged() == store.judged()
            mirror.save(sample(1, "b", prompt))
            assert mirror.sample_numbers(1) == {0, 1}
            with pytest.raises(sqlite3.IntegrityError):
                mirror.save(sample(2, "c", "no such prompt"))
        assert store.sample_numbers(1) == {0}
