"""Compatibility of a run made under the oldest supported JAX version with all others.

`stored/jax-0.10.2/run.sqlite` is one iteration of 12 samples over the zoo (`small_config` with
`iterations=1`), made under JAX 0.10.2 by sdjax 0.2, which recorded fewer versions and no inputs.
"""

import dataclasses
import json
import re
import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from sdjax.cli.check import check_files
from sdjax.cli.merge_discovered import merge_discovered
from sdjax.cli.sandbox_options import signature_from_options
from sdjax.core.errors import UserError
from sdjax.merging.recipe.from_algorithm import open_models
from sdjax.programs.signature import merge_signature
from sdjax.sandbox.verify.verified_program import verify_ir
from sdjax.search.config import config_from
from sdjax.search.database import OLDEST_VERSION, VERSION
from sdjax.search.resume import resume_store
from sdjax.search.schema import TABLES, migrations
from sdjax.search.score_types import Application, StoredPair
from sdjax.search.store import Store
from sdjax.search.types import Change, Checkpoint, Program, RunInput

STORED = Path(__file__).parent / "stored" / "jax-0.10.2" / "run.sqlite"


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(STORED, folder)
    return folder


def test_stored_run_keeps_the_identities_of_its_programs(run):
    with Store.open(run) as store:
        config = config_from(store.run().config, str(run))
        programs = store.by_key(Program)
    experts = {slot: config.experts[slot].model for slot in config.slots}
    models = open_models(config.seed, experts, Path.cwd())
    signature = merge_signature(models, config.scope, config.sandbox)
    assert len(programs) >= 8
    for identity, program in programs.items():
        assert verify_ir(program.ir, signature).identity == identity


def test_check_gives_programs_the_verdicts_and_identities_of_their_run(run, tmp_path):
    with Store.open(run) as store:
        programs = store.by_key(Program)
    for identity, program in programs.items():
        (tmp_path / f"{identity}.py").write_text(program.source)
    files = [str(tmp_path / f"{identity}.py") for identity in programs]
    signature = signature_from_options(model=None, experts=None, scope=None, run=run)
    text, _ = check_files(files, signature, as_json=True)
    rows = [json.loads(line) for line in text.split("\n")]
    assert [row["identity"] for row in rows] == list(programs)
    assert {row["verdict"] for row in rows} <= {"admitted", "duplicate"}
    with pytest.raises(UserError, match="remove --experts"):
        signature_from_options(model=None, experts=3, scope=None, run=run)


def test_best_program_of_a_stored_run_can_be_merged(run, tmp_path):
    out = tmp_path / "merged"
    merge_discovered(run, 1, out)
    assert (out / "model.safetensors").stat().st_size > 1_000_000


def test_pairs_of_an_earlier_version_are_kept(run):
    with Store.open(run) as store:
        pairs = store.select(StoredPair)
    with Store.open(run, write=True) as store:  # which updates the database
        assert store.select(StoredPair) == pairs
        assert len(pairs) == 16
        refused = dataclasses.replace(pairs[0].rejected, identity="", fault="refused")
        store.save(dataclasses.replace(pairs[0], number=16, rejected=refused))
    with Store.open(run) as store:
        assert store.select(StoredPair)[-1].rejected == refused


def version_of(folder):
    with closing(sqlite3.connect(folder / "run.sqlite")) as connection:
        return connection.execute("PRAGMA user_version").fetchone()[0]


@pytest.mark.parametrize("version", range(OLDEST_VERSION, VERSION))
def test_database_of_each_earlier_version_is_read_and_migrated(run, version):
    with Store.open(run) as store:
        samples, summaries = store.judged(), store.summaries(None, None)
    with closing(sqlite3.connect(run / "run.sqlite")) as connection:
        for number in range(OLDEST_VERSION, version):
            connection.executescript(migrations()[number])
        connection.execute(f"PRAGMA user_version = {version}")
    for write in (False, True, False):
        with Store.open(run, write=write) as store:
            assert (store.judged(), store.summaries(None, None)) == (samples, summaries)
            for record in TABLES:
                store.select(record)
    assert version_of(run) == VERSION


def test_interrupted_migration_changes_nothing(run, monkeypatch):
    """The connection ends before the last statement, as it does when the process is killed."""
    steps = migrations()
    cut = {**steps, VERSION - 1: f"{steps[VERSION - 1]} SELECT killed();"}
    monkeypatch.setattr("sdjax.search.store.migrations", lambda: cut)
    with pytest.raises(UserError, match="killed"):
        Store.open(run, write=True)
    monkeypatch.undo()
    assert version_of(run) == VERSION - 1
    with Store.open(run, write=True) as store:
        assert len(store.judged()) == 12
    assert version_of(run) == VERSION


INPUTS = {"seed": "5eed", "expert_1": "e1"}


def test_run_of_an_earlier_version_is_resumed_only_if_accepted(run):
    with Store.open(run) as store:
        assert store.select(RunInput) == store.select(Change) == ()
        config = config_from(store.run().config, str(run))
        samples = store.judged()
    with Store.open(run, write=True) as store:
        with pytest.raises(UserError, match="--accept-versions") as caught:
            resume_store(store, config, INPUTS, accept_versions=False)
        assert re.search(r"not recorded: jaxlib, .*expert_1, seed;", str(caught.value))
        changes = resume_store(store, config, INPUTS, accept_versions=True)
        assert {one.key for one in changes if one.old == "unknown"} >= {"jaxlib", *INPUTS}
    with Store.open(run, write=True) as store:
        assert store.judged() == samples
        store.save(Checkpoint(name="generator-2", iteration=2, path="generators/2"))
        assert [one.iteration for one in store.select(Checkpoint)] == [1, 2]
        duplicate = dataclasses.replace(store.select(Application)[0], original="an identity")
        store.save(duplicate)
        assert duplicate in store.select(Application)
        assert {one.name: one.fingerprint for one in store.select(RunInput)} == INPUTS
        assert [dataclasses.replace(one, changed_at="") for one in store.select(Change)] == list(
            changes
        )
        assert resume_store(store, config, INPUTS, accept_versions=False) == ()
        with pytest.raises(UserError, match="expert_1 e1 -> e2; so"):
            resume_store(store, config, INPUTS | {"expert_1": "e2"}, accept_versions=False)
        # New transfer experts are no difference.
        assert (
            resume_store(store, config, INPUTS | {"transfer 1": "t"}, accept_versions=False) == ()
        )
        assert store.by_key(RunInput)["transfer 1"].fingerprint == "t"
