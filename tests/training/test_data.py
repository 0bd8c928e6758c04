"""Tokenization of training data, and errors in it."""

import json

import pytest

from sdjax.core.errors import UserError
from sdjax.io.model_paths import zoo_models
from sdjax.io.tokenizer import Tokenizer, load_tokenizer
from sdjax.training.data import TrainingRow, read_rows, tokenize_examples, tokenize_pairs

TOKENIZER = load_tokenizer(zoo_models()["seed"])


def rows(*fields):
    return [
        TrainingRow(where=f"pairs.jsonl, line {n}", fields=one) for n, one in enumerate(fields, 1)
    ]


def preference(prompt="1+1=", chosen="2", rejected="3"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_both_completions_of_a_pair_end_with_the_end_token(caplog):
    (pair,) = tokenize_pairs(rows(preference()), TOKENIZER, 64)
    assert caplog.messages == []
    assert pair.chosen.prompt == pair.rejected.prompt
    assert TOKENIZER.decode(pair.chosen.target, skip_special=True) == "2"
    assert pair.chosen.target[-1] == pair.rejected.target[-1] == TOKENIZER.eos_ids[0]


def test_prompts_are_truncated_from_the_left_and_completions_never(caplog):
    long = preference(prompt="1+1=" * 30, chosen="2", rejected="3")
    too_long = preference(chosen="2" * 100)
    pairs = tokenize_pairs(rows(long, too_long, preference()), TOKENIZER, 40)
    assert len(pairs) == 2
    assert len(pairs[0].chosen) == 40
    whole = TOKENIZER.encode(long["prompt"], add_special=True)
    assert pairs[0].chosen.prompt == tuple(whole[-len(pairs[0].chosen.prompt) :])
    assert caplog.messages == [
        "1 of 3 prompts were truncated from the left",
        "1 of 3 rows were dropped because a completion does not fit into 40 tokens; to train on "
        "them, raise max_length, up to the model's maximum sequence length",
    ]


TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (preference(rejected="2"), "line 1: chosen and rejected are equal"),
        (
            {"prompt": "a", "chosen": "b"},
            "line 1: missing field rejected; the fields are prompt, chosen",
        ),
        ({"chosen": "a", "rejected": "b"}, "line 1: missing field prompt"),
        (preference(chosen="1" * 99, rejected="2" * 99), "no pair fits into 64 tokens"),
        (preference(prompt=""), "line 1: the prompt is empty"),
        (preference(chosen=""), "line 1: the completion is empty"),
        (preference(chosen=None), "chosen must be a string, or messages .*, not null"),
        (preference(prompt=7), "prompt must be a string, or messages with role and content, not 7"),
        (preference(chosen=[{"role": "user"}]), "chosen must be a string, or messages"),
        (preference(chosen=[TURN]), "must both be strings or both be messages"),
        (
            preference(prompt=[TURN]),
            "prompt is a list of messages, so the completion",
        ),
        ({"chosen": [TURN], "rejected": [TURN, TURN]}, "must share their first messages"),
        ({"chosen": [TURN, TURN], "rejected": [TURN, TURN]}, "chosen and rejected are equal"),
    ],
)
def test_invalid_rows_raise_user_error(row, message):
    with pytest.raises(UserError, match=message):
        tokenize_pairs(rows(row), TOKENIZER, 64)


def test_completion_containing_the_end_token_gets_another():
    end = TOKENIZER.decode(TOKENIZER.eos_ids[:1], skip_special=False)
    (example,) = tokenize_examples(
        rows({"prompt": "1+1=", "completion": f"2{end}3"}), TOKENIZER, 64
    )
    assert example.target.count(TOKENIZER.eos_ids[0]) == 2
    assert example.target[-1] == TOKENIZER.eos_ids[0]


@pytest.mark.parametrize("messages", [None, [], ["hi"], [TURN], [TURN, {"role": "user"}]])
def test_invalid_messages_raise_user_error(messages):
    with pytest.raises(UserError, match="line 1: messages must be"):
        tokenize_examples(rows({"messages": messages}), TOKENIZER, 64)


def test_empty_file_raises_user_error(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(UserError, match="no examples"):
        read_rows(str(tmp_path / "pairs.jsonl"), "train")


def test_chat_messages_are_rendered_by_the_template(monkeypatch):
    class ChatTokenizer(Tokenizer):
        def __init__(self):
            pass

        eos_ids = (1,)

        def encode(self, text, *, add_special):
            return [1 if c == "|" else ord(c) for c in text]

        def render_chat(self, messages, *, add_generation_prompt=True):
            text = "".join(f"{m['role'][0]}:{m['content']}|\n" for m in messages)
            return text + ("a:" if add_generation_prompt else "")

    question = {"role": "user", "content": "hi"}
    answers = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    separate = {"prompt": [question], "chosen": answers[:1], "rejected": answers[1:]}
    joined = {"chosen": [question, answers[0]], "rejected": [question, answers[1]]}
    pairs = tokenize_pairs(rows(separate, joined), ChatTokenizer(), 64)
    assert pairs[0] == pairs[1]
    assert "".join(map(chr, pairs[0].chosen.prompt)) == "u:hi\x01\na:"
    assert "".join(map(chr, pairs[0].rejected.target)) == "no\x01\n"
    (example,) = tokenize_examples(rows({"messages": [question, answers[0]]}), ChatTokenizer(), 64)
    assert example == pairs[0].chosen


def test_data_set_is_read_by_name(tmp_path):
    lines = [json.dumps(preference()), json.dumps(preference(chosen="4"))]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    found = read_rows(f"datasets:{tmp_path}", "train")
    assert [row.fields["chosen"] for row in found] == ["2", "4"]
    assert found[1].where == f"datasets:{tmp_path}, row 2"
    with pytest.raises(UserError, match=r"split nosuch: cannot be loaded"):
        read_rows(f"datasets:{tmp_path}", "nosuch")
