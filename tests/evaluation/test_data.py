"""Rows of files and of the hub, and errors in them."""

import datasets
import pytest

from sdjax.core.errors import UserError
from sdjax.evaluation.data import HubDataset, read_rows
from sdjax.evaluation.tasks.registry import find_task

FIELDS = ("question", "answer")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "contains no problems; write one JSON object per line"),
        ("\n\n", "contains no problems"),
        ('{"question": "?", "answer": 1}\n{"question": ', "line 2: not JSON"),
        ('{"question": "?"}\n', "line 1: needs the fields question, answer; found: question"),
        ("[1]\n", "line 1: needs the fields question, answer; found: not an object"),
        ('\n{"question": null, "answer": 1}', "line 2: the field question must be a string or a n"),
        (
            '{"question": "?", "answer": [1]}',
            "line 1: the field answer must be a string or a number",
        ),
    ],
)
def test_errors_in_a_file_name_the_line(tmp_path, text, message):
    path = tmp_path / "data.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"data.jsonl.*{message}"):
        find_task(str(path)).problems("test")


def test_text_may_contain_any_line_separator(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "a\u2028b\x85c", "answer": 1}\n', encoding="utf-8")
    (row,) = read_rows("mine", path, None, "test", FIELDS)
    assert row.text("question") == "a\u2028b\x85c"


def test_missing_file_raises_user_error(tmp_path):
    for data in (tmp_path, tmp_path / "none.jsonl"):
        with pytest.raises(
            UserError, match=r"not a file, and not a folder that contains test.jsonl"
        ):
            read_rows("mine", data, None, "test", FIELDS)
        assert read_rows("mine", data, None, "train", FIELDS) == []


def test_hub_configs_are_read_in_order(monkeypatch):
    requests = []

    def load_dataset(path, config, *, split, trust_remote_code):
        assert not trust_remote_code
        requests.append((path, config, split))
        return datasets.Dataset.from_list([{"question": f"{config}?", "answer": "#### 1"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    rows = read_rows(
        "mine", None, HubDataset(path="some/data", configs=("a", "b")), "train", FIELDS
    )
    assert [row.text("question") for row in rows] == ["a?", "b?"]
    assert requests == [("some/data", "a", "train"), ("some/data", "b", "train")]
    task = find_task("gsm8k", development=0, shots=1)
    (problem,) = task.problems("test")
    assert [one.id for one in task.examples(problem)] == ["train-0"]
    assert requests[2:] == [("openai/gsm8k", "main", "test"), ("openai/gsm8k", "main", "train")]
    with pytest.raises(
        UserError, match=r"some/data \(a, test\), row 0: missing field problem; the fields are"
    ):
        read_rows("mine", None, HubDataset(path="some/data", configs=("a",)), "test", ("problem",))


def test_unreachable_hub_raises_user_error_with_remedy(monkeypatch):
    def load_dataset(*arguments, **settings):
        raise ConnectionError("Couldn't reach the Hub\nat all")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError) as caught:
        find_task("svamp").problems("test")
    assert str(caught.value) == (
        "task svamp: ChilleD/SVAMP cannot be loaded from the Hugging Face Hub (it is not in the "
        "cache, and HF_HUB_OFFLINE is set); without a network, pass a file with --data PATH, or "
        "set task.data in the config"
    )
