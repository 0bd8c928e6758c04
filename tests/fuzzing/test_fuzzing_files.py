"""A short run of the fuzzer; `python -m tests.fuzzing` is the long one."""

import json
import random
import sqlite3

import pytest

from sdjax.core.errors import UserError
from tests.fuzzing import mutations, run, trees
from tests.fuzzing.kinds import Kind
from tests.fuzzing.run import Fuzzer, Hang
from tests.fuzzing.targets import KINDS

# Loaders that take long are called for every 20th input, or more rarely.
NUMBERS = range(1, 20)
# These need transformers, Orbax or the process that renders chat templates, whose start takes
# seconds, or merge all tensors.
SLOW = ("chat-template", "checkpoint", "tokenizer-json", "tokenizer-config", "partial-merge")
SLOW += ("jsonl", "jsonl-gzip")


@pytest.mark.parametrize("name", [name for name in KINDS if name not in SLOW])
def test_mutated_files_are_read_or_refused_in_one_line(name):
    with Fuzzer(name, seed=17) as fuzzer:
        outcomes = [fuzzer.run(number) for number in NUMBERS]
    assert [outcome.fault for outcome in outcomes if outcome.fault is not None] == []
    assert all(outcome.refused or outcome.accepted for outcome in outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("name", KINDS)
def test_valid_files_are_accepted_and_many_mutated_ones_are_not(name):
    with Fuzzer(name, seed=18) as fuzzer:
        fuzzer.check_valid()
        outcomes = [fuzzer.run(number) for number in range(100)]
    assert [outcome.fault for outcome in outcomes if outcome.fault is not None] == []
    # A training job computes again what is damaged.
    assert any(outcome.refused for outcome in outcomes) or name == "training-folder"
    assert any(outcome.accepted for outcome in outcomes)


def small_kind(load):
    files = [{"a.json": b'{"a": [1, "x", {"b": null}]}'}]
    return Kind(folders=files, formats={"a.json": mutations.mutate_json}, loaders=[(load, 1)])


def judged(load):
    with Fuzzer("small", kind=small_kind(load)) as fuzzer:
        return fuzzer.run(1)


def raises(error):
    def load(folder):
        raise error

    return load


def never_ends(folder):
    while True:
        pass


@pytest.mark.parametrize(
    ("load", "key"),
    [
        (raises(KeyError("a")), "KeyError at"),
        (raises(SystemExit(1)), "SystemExit at"),
        (never_ends, "Hang at"),
        (lambda folder: (folder.parents[1] / "outside" / "x").touch(), "the folder outside"),
        (lambda folder: (folder.parent / "x").touch(), "the parent folder"),
        (lambda folder: (folder / "x").touch(), "the input"),
        (lambda folder: open("x", "w").close(), "the working directory"),
        (
            lambda folder: (folder.parent / "out").symlink_to(folder.parents[1] / "outside"),
            "the result has a file from outside",
        ),
    ],
)
def test_faults_are_found(load, key, monkeypatch):
    monkeypatch.setattr(run, "SECONDS", 0.2)
    outcome = judged(load)
    assert outcome.fault is not None
    assert outcome.key.startswith(key)


def test_user_errors_are_refusals():
    outcome = judged(raises(UserError("a: b\nc")))
    assert (outcome.fault, outcome.refused) == (None, ["sdjax: a: b c"])
    with pytest.raises(Hang), run._time_limit():
        raise Hang


def test_an_input_is_reproduced_by_its_number(tmp_path):
    contents = []
    with Fuzzer("small", kind=small_kind(lambda folder: None), seed=3) as fuzzer:
        for number in (7, 7, 8, 9, 10):
            folder = tmp_path / str(len(contents))
            fuzzer.write_input(number, folder)
            contents.append((folder / "a.json").read_bytes())
    assert contents[0] == contents[1]
    assert len(set(contents)) == 4


def test_mutations_change_nodes_and_keep_the_rest():
    tree = {"a": [1, {"b": "x"}], "c": None}
    draw, before = random.Random(0), repr(tree)
    texts = [trees.to_text(trees.mutated(tree, [tree], ["word"], draw)) for _ in range(300)]
    assert repr(tree) == before
    assert len(set(texts)) > 100
    assert any('"word"' in text for text in texts)
    assert any("NaN" in text for text in texts)


def test_mutated_databases_differ_in_cells_and_declarations(tmp_path):
    path = tmp_path / "x.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE t (a TEXT NOT NULL) STRICT")
        connection.execute("INSERT INTO t VALUES (?)", (json.dumps({"x": 1}),))
    connection.close()
    content, draw, found = path.read_bytes(), random.Random(0), set()
    for _ in range(100):
        corpus = mutations.Corpus(contents=[content])
        path.write_bytes(mutations.mutate_sqlite(content, corpus, draw))
        connection = sqlite3.connect(path)
        try:
            found.add(str(connection.execute("SELECT a, typeof(a) FROM t").fetchall()))
        except sqlite3.Error as error:
            found.add(str(error))
        connection.close()
    assert any("'blob'" in text for text in found)  # in spite of STRICT
    assert any("'null'" in text for text in found)
    assert any("no such table" in text for text in found)
    assert len(found) > 15
