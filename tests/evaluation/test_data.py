"""Rows of files and of the hub, and every mistake in them."""

import datasets
import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.data import Hub, read_rows
from sdjax.evaluation.tasks.registry import find_task

FIELDS = ("question", "answer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no problem; write one JSON object a line"),
        ("\n\n", "holds no problem"),
        ('{"question": "?", "answer": 1}\n{"question": ', "line 2: not JSON"),
        ('{"question": "?"}\n', "line 1: needs the fields question, answer; found: question"),
        ("[1]\n", "line 1: needs the fields question, answer; found: no object"),
        ('\n{"question": null, "answer": 1}', "line 2: the field question must be a text or a num"),
        ('{"question": "?", "answer": [1]}', "line 1: the field answer must be a text or a number"),
    ],
)
def test_mistakes_in_a_file_name_the_line(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"data.jsonl.*{message}"):
        find_task(str(path)).problems("test")


def test_a_text_may_hold_any_separator(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a\u2028b\x85c", "answer": 1}\n', encoding="utf-8")
    (row,) = read_rows("mine", path, None, "test", FIELDS)
    assert row.text("question") == "a\u2028b\x85c"


def test_no_file(tmp_path):
    for data in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(UserError, match=r"no such file, and no folder with test.jsonl"):
            read_rows("mine", data, None, "test", FIELDS)
        assert read_rows("mine", data, None, "train", FIELDS) == []


def test_the_hub_is_asked_part_by_part(monkeypatch):
    asked = []

    def load_dataset(path, config, *, split):
        asked.append((path, config, split))
        return datasets.Dataset.from_list([{"question": f"{config}?", "answer": "#### 1"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows("mine", None, Hub(path="some/data", configs=("a", "b")), "train", FIELDS)
    assert [row.text("question") for row in rows] == ["a?", "b?"]
    assert asked == [("some/data", "a", "train"), ("some/data", "b", "train")]
    task = find_task("gsm8k", development=0, shots=1)
    (problem,) = task.problems("test")
    assert [one.id for one in task.examples(problem)] == ["train-0"]
    assert asked[2:] == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    with pytest.raises(
        UserError, match=r"some/data \(a, test\), row 0: has no field problem; it has"
    ):
        read_rows("mine", None, Hub(path="some/data", configs=("a",)), "test", ("problem",))


def test_without_a_network_the_error_says_what_to_give(monkeypatch):
    def load_dataset(*arguments, **settings):
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        find_task("svamp").problems("test")
    assert str(caught.value) == (
        "task svamp: ChilleD/SVAMP cannot be loaded from the Hugging Face hub (Couldn't reach the "
        "Hub at all); without a network give a file: --data PATH, or task.data of a configuration"
    )
