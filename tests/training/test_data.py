"""Rows that a user brings, and what is wrong with them."""

import json

import pytest

from sdjax.core.errors import UserError
from sdjax.io.model_paths import zoo_models
from sdjax.io.tokenizer import load_tokenizer
from sdjax.training.data import Row, preference_pairs, read_rows, texts_to_learn

TOKENIZER = load_tokenizer(zoo_models()["seed"])


def rows(*fields):
    return [Row(where=f"pairs.jsonl, line {n}", fields=one) for n, one in enumerate(fields, 1)]


def preference(prompt="1+1=", chosen="2", rejected="3"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_pair_has_the_end_token_behind_both_answers():
    ((pair,), notes) = preference_pairs(rows(preference()), TOKENIZER, 64)
    assert notes == []
    assert pair.winner.prompt == pair.loser.prompt
    assert TOKENIZER.decode(pair.winner.target, skip_special=True) == "2"
    assert pair.winner.target[-1] == pair.loser.target[-1] == TOKENIZER.eos_ids[0]


def test_prompts_are_cut_from_the_left_and_answers_never():
    long = preference(prompt="1+1=" * 30, chosen="2", rejected="3")
    too_long = preference(chosen="2" * 100)
    pairs, notes = preference_pairs(rows(long, too_long, preference()), TOKENIZER, 40)
    assert len(pairs) == 2
    assert len(pairs[0].winner) == 40
    whole = TOKENIZER.encode(long["prompt"], add_special=True)
    assert pairs[0].winner.prompt == tuple(whole[-len(pairs[0].winner.prompt) :])
    assert notes == [
        "1 of 3 rows: the prompt is cut from the left",
        "1 of 3 rows are left out: an answer is longer than 40 tokens; raise length, up to the "
        "model's context, to train on them",
    ]


TURN = {"role": "user", "content": "hi"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (preference(rejected="2"), "line 1: chosen and rejected are equal"),
        ({"prompt": "a", "chosen": "b"}, "line 1: needs the field rejected; it has prompt, chosen"),
        ({"chosen": "a", "rejected": "b"}, "line 1: needs the field prompt"),
        (preference(chosen="1" * 99, rejected="2" * 99), "no pair fits into 64 tokens"),
        (preference(prompt=""), "line 1: the prompt is empty"),
        (preference(chosen=""), "line 1: the answer is empty"),
        (preference(chosen=None), "chosen must be a text, or messages .*; it is null"),
        (preference(prompt=7), "prompt must be a text, or messages of role and content; it is 7"),
        (preference(chosen=[{"role": "user"}]), "chosen must be a text, or messages"),
        (preference(chosen=[TURN]), "one side is a text, the other is messages"),
        (preference(prompt=[TURN]), "the prompt is messages, so the answer must be messages"),
        ({"chosen": [TURN], "rejected": [TURN, TURN]}, "begin alike and go on differently"),
        ({"chosen": [TURN, TURN], "rejected": [TURN, TURN]}, "chosen and rejected are equal"),
    ],
)
def test_bad_rows_are_named(row, message):
    with pytest.raises(UserError, match=message):
        preference_pairs(rows(row), TOKENIZER, 64)


def test_an_answer_that_speaks_of_the_end_token_gets_its_own():
    end = TOKENIZER.decode(TOKENIZER.eos_ids[:1], skip_special=False)
    ((example,), _) = texts_to_learn(
        rows({"prompt": "1+1=", "completion": f"2{end}3"}), TOKENIZER, 64
    )
    assert example.target.count(TOKENIZER.eos_ids[0]) == 2
    assert example.target[-1] == TOKENIZER.eos_ids[0]


@pytest.mark.parametrize("messages", [None, [], ["hi"], [TURN], [TURN, {"role": "user"}]])
def test_what_is_no_conversation_is_named(messages):
    with pytest.raises(UserError, match="line 1: messages must be"):
        texts_to_learn(rows({"messages": messages}), TOKENIZER, 64)


def test_an_empty_file_is_an_error(tmp_path):
    (tmp_path / "pairs.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no example"):
        read_rows(str(tmp_path / "pairs.jsonl"), "train")


def test_chat_messages_are_rendered_by_the_template(monkeypatch):
    class Chatting:
        eos_ids = (1,)

        def encode(self, text, *, add_special):
            return [1 if c == "|" else ord(c) for c in text]

        def render_chat(self, messages, *, add_generation_prompt=True):
            text = "".join(f"{m['role'][0]}:{m['content']}|\n" for m in messages)
            return text + ("a:" if add_generation_prompt else "")

    question = {"role": "user", "content": "hi"}
    answers = [{"role": "assistant", "content": text} for text in ("yes", "no")]
    apart = {"prompt": [question], "chosen": answers[:1], "rejected": answers[1:]}
    joined = {"chosen": [question, answers[0]], "rejected": [question, answers[1]]}
    pairs, _ = preference_pairs(rows(apart, joined), Chatting(), 64)
    assert pairs[0] == pairs[1]
    assert "".join(map(chr, pairs[0].winner.prompt)) == "u:hi\x01\na:"
    assert "".join(map(chr, pairs[0].loser.target)) == "no\x01\n"
    ((example,), _) = texts_to_learn(rows({"messages": [question, answers[0]]}), Chatting(), 64)
    assert example == pairs[0].winner


def test_a_data_set_by_its_name(tmp_path):
    lines = [json.dumps(preference()), json.dumps(preference(chosen="4"))]
    (tmp_path / "train.jsonl").write_text("\n".join(lines))
    found = read_rows(f"datasets:{tmp_path}", "train")
    assert [row.fields["chosen"] for row in found] == ["2", "4"]
    assert found[1].where == f"datasets:{tmp_path}, row 2"
    with pytest.raises(UserError, match=r"split nosuch: cannot be loaded"):
        read_rows(f"datasets:{tmp_path}", "nosuch")
