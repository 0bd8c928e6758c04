"""Databases of runs that are damaged, or that somebody else wrote."""

import re
import shutil
import sqlite3
import struct
from pathlib import Path

import pytest
from click.testing import CliRunner

from sdjax.cli.main import main
from sdjax.core.errors import UserError
from sdjax.report.data import read_report
from sdjax.search.attempts import attempt_seconds, make_attempt_the_last, pending_attempt
from sdjax.search.database import _create_file
from sdjax.search.schema import TABLES
from sdjax.search.store import Store
from sdjax.search.types import DEVELOPMENT

STORED = Path(__file__).parent / "stored" / "jax-0.10.2" / "run.sqlite"


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr("sdjax.search.schema_check.MAX_CELL_BYTES", 1_000_000)
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(STORED, folder)
    return folder


def execute(run, statement, *values):
    with sqlite3.connect(run / "run.sqlite") as connection:
        connection.execute(statement, values)


def change_declaration(run, table, old, new):
    with sqlite3.connect(run / "run.sqlite") as connection:
        connection.execute("PRAGMA writable_schema = ON")
        query = "UPDATE sqlite_master SET sql = replace(sql, ?, ?) WHERE name = ?"
        assert connection.execute(query, (old, new, table)).rowcount == 1


def read_all(run):
    with Store.open(run) as store:
        for record in TABLES:
            store.select(record)
        store.run()
        store.judged()
        store.summaries(DEVELOPMENT)
        store.sample_numbers(1)


VALUES = {
    ("run", "config"): ("[]", "5", "{", "[" * 100_000, '{"a": {"b": 1}, "a": 2}'),
    ("run", "versions"): ('{"jax": 5}', "[]", "null"),
    ("run", "layers"): ('"seccomp"', "[1]", '{"a": "b"}'),
    ("sample", "number"): (-1, 1 << 40),
    ("sample", "iteration"): (-1, 1 << 62),
    ("sample", "stopped"): (2, -1),
    ("sample", "tokens"): (b"abc",),
    ("verdict", "notes"): ("[[]]", "nan"),
    ("program", "families"): ('["a", null]', "{}"),
    ("program", "cost"): (-5,),
    ("entry", "detail"): ("[1]", "NaN"),
    ("application", "change"): (float("inf"),),
    ("checkpoint", "detail"): ("7",),
    ("score", "outcome_strict"): (3,),
    ("setting", "slots"): ('{"expert_1": 1}', "9" * 5_000),
}


@pytest.mark.parametrize(
    ("table", "column", "value"),
    [(*place, value) for place, values in VALUES.items() for value in values],
    ids=lambda value: str(value)[:12],
)
def test_impossible_value_is_reported_with_table_and_column(run, table, column, value):
    execute(run, f"UPDATE {table} SET {column} = ? WHERE rowid = 1", value)
    with pytest.raises(UserError, match=rf"run\.sqlite: table {table}, column {column}: ") as error:
        read_all(run)
    assert len(str(error.value)) < 400
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("table", "column", "kind", "value", "reason"),
    [
        ("verdict", "cost", "INTEGER", "7", "verdict.cost"),
        ("sample", "stopped", "INTEGER NOT NULL", b"7", "sample.stopped"),
        ("program", "ir", "TEXT NOT NULL", None, "program.ir"),
        ("run", "config", "TEXT NOT NULL", b"{}", "run.config"),
        ("sample", "tokens", "BLOB NOT NULL", 5, "sample.tokens"),
    ],
)
def test_value_of_another_type_is_reported(run, table, column, kind, value, reason):
    change_declaration(run, table, f"{column} {kind}", f"{column} ANY")
    execute(run, f"UPDATE {table} SET {column} = ? WHERE rowid = 1", value)
    with pytest.raises(UserError, match=r"run\.sqlite: .*table '\w+' is not one of a run"):
        Store.open(run)
    change_declaration(run, table, f"{column} ANY", f"{column} {kind}")
    with pytest.raises(UserError, match=r"run\.sqlite: damaged \(.*" + re.escape(reason)) as error:
        Store.open(run)
    assert "\n" not in str(error.value)


ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x FROM n"


@pytest.mark.parametrize(
    "statement",
    [
        f"CREATE VIEW attempt AS {ENDLESS}",
        "CREATE TRIGGER t AFTER INSERT ON phase BEGIN DELETE FROM phase; END",
        "CREATE TABLE t (a TEXT, b TEXT AS (hex(zeroblob(500000000)))) STRICT",
        "CREATE TABLE t (a TEXT DEFAULT (hex(zeroblob(500000000)))) STRICT",
        "CREATE TABLE t (a TEXT CHECK (length(hex(zeroblob(500000000))) > 0)) STRICT",
        "CREATE TABLE t (a TEXT)",
        "CREATE INDEX i ON sample (hex(text))",
        "CREATE VIRTUAL TABLE t USING fts5(a)",
    ],
    ids=lambda text: " ".join(text.split()[1:3]),
)
def test_declarations_that_run_code_are_refused(run, statement):
    execute(run, statement)
    with pytest.raises(UserError, match=r"the (view|trigger|table|index) '\w+' is not one of"):
        Store.open(run)
    assert pending_attempt(run) is None
    assert not make_attempt_the_last(run)
    assert attempt_seconds(run) == float("inf")


@pytest.mark.parametrize("config", ["5", "[]", "{}", "[" * 100_000, '{"sandbox": 3}', "x" * 99])
def test_watchdog_ignores_a_damaged_config(run, config):
    execute(run, "UPDATE run SET config = ?", config)
    assert attempt_seconds(run) == float("inf")


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE sample SET text = hex(zeroblob(600000)) WHERE number = 1", "too big"),
        ("DROP TABLE phase", "the table phase is missing"),
        ("ALTER TABLE sample DROP COLUMN text", "the column text of the table sample is missing"),
        ("DELETE FROM prompt", "a row of the table pair refers to one of prompt that is missing"),
        ("DELETE FROM run", "the table `run` is empty"),
    ],
)
def test_damage_is_reported(run, statement, message):
    execute(run, statement)
    with pytest.raises(UserError, match=rf"run\.sqlite: .*{message}"):
        read_all(run)


def hot_journal(database, deleted):
    """Return a journal that SQLite applies, whose end names a file that SQLite then deletes."""
    page_size, name = 4096, str(deleted).encode()
    head = bytes.fromhex("d9d505f920a163d7")
    pages = len(database) // page_size
    journal = (head + struct.pack(">IIIII", 0, 0, pages, 512, page_size)).ljust(512, b"\0")
    end = struct.pack(">II", len(name), sum(name))
    return journal + struct.pack(">I", 2**30 // page_size + 1) + name + end + head


@pytest.mark.parametrize("write", [False, True])
def test_a_journal_is_refused_and_not_applied(run, tmp_path, write):
    victim, journal = tmp_path / "victim", run / "run.sqlite-journal"
    victim.write_text("kept")
    content = (run / "run.sqlite").read_bytes()
    journal.write_bytes(hot_journal(content, victim))
    with pytest.raises(
        UserError, match=r"run\.sqlite-journal: a rollback journal, which sdjax does"
    ):
        Store.open(run, write=write)
    assert pending_attempt(run) is None
    assert not make_attempt_the_last(run)
    assert victim.read_text() == "kept"
    assert journal.exists()
    assert (run / "run.sqlite").read_bytes() == content


def test_a_database_has_no_journal_from_its_first_moment(tmp_path):
    """One that another process has left next to the hidden name is not applied either."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / ".run.sqlite.partial-journal").write_bytes(hot_journal(b"", tmp_path / "x"))
    (tmp_path / "x").write_text("kept")
    _create_file(tmp_path / "run" / "run.sqlite", "CREATE TABLE a (b TEXT) STRICT;", [])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["run.sqlite"]
    assert (tmp_path / "run" / "run.sqlite").read_bytes()[18:20] == b"\2\2"  # WAL
    assert (tmp_path / "x").read_text() == "kept"


def test_tables_have_their_keys(run):
    for key in ("PRIMARY KEY (name), ", "FOREIGN KEY (setting) REFERENCES setting(name), "):
        change_declaration(run, "lineage", key, "")
    with pytest.raises(UserError, match="the table lineage is declared differently"):
        Store.open(run)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE program SET ir = '{}'", "the stored program '"),
        ("UPDATE program SET ir = hex(zeroblob(300000))", "the stored program '"),
        ("UPDATE program SET ir = replace(ir, 'mul', 'callback')", "the stored program '"),
        ("UPDATE program SET ir = hex(zeroblob(600000))", "too big"),
        ("UPDATE run SET config = '{}'", "its config: the key"),
        ("UPDATE run SET config = '[]'", "table run, column config: is not an object"),
        ("DELETE FROM score", "the run has no scored program"),
        ("CREATE VIEW v AS SELECT 1", "the view 'v' is not one of a run"),
    ],
)
def test_merge_reports_a_foreign_store_in_one_line(run, tmp_path, statement, message):
    execute(run, statement)
    result = CliRunner().invoke(main, ["merge", "--run", str(run), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert re.fullmatch(r"sdjax: .*\n", result.output)
    assert message in result.output


@pytest.mark.parametrize("ir", ["", "[]", "{", '{"programs": 5}', "[" * 100_000])
def test_merge_refuses_a_changed_program_in_one_line(run, tmp_path, ir):
    execute(run, "UPDATE program SET ir = ?", ir)
    result = CliRunner().invoke(main, ["merge", "--run", str(run), str(tmp_path / "out")])
    assert result.exit_code == 2
    assert re.fullmatch(r"sdjax: the stored program '\w{12}' is not accepted .*\n", result.output)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("value", ["5", '"x"', "[]", "null", '{"metric": "entry", "top_k": "x"}'])
def test_report_passes_over_values_of_a_config_that_it_cannot_use(run, value):
    keys = ("task", "test", "selection", "iterations", "name", "seed", "generator")
    config = "{" + ", ".join(f'"{key}": {value}' for key in keys) + "}"
    execute(run, "UPDATE run SET config = ?", config)
    execute(run, "UPDATE entry SET detail = ?", f'{{"grids": {value}}}')
    with Store.open(run) as store:
        data = read_report(store)
    assert data.metric == "strict"


def test_key_that_differs_from_its_index_is_damage(run):
    path = run / "run.sqlite"
    content = path.read_bytes()
    name = b"method:task_arithmetic(weight=0.6)"
    assert content.count(name) > 1
    path.write_bytes(content.replace(name, name.replace(b"0.6", b"0.7"), 1))
    with pytest.raises(UserError, match=r"run\.sqlite: damaged"):
        Store.open(run)


def test_schema_that_is_not_text_is_damage(run):
    path = run / "run.sqlite"
    path.write_bytes(
        path.read_bytes().replace(b"CREATE TABLE setting (", b"CREATE TABLE sett\xa7ng (", 1)
    )
    with pytest.raises(UserError) as caught:
        Store.open(run)
    assert "\n" not in str(caught.value)
    assert pending_attempt(run) is None
